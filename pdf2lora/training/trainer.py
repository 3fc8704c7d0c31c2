"""build_trainer(): the one training step that find_batch measures and train runs."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.model.device import compute_dtype
from pdf2lora.model.forward import Forward, build_forward
from pdf2lora.model.kernel_choice import Kernels
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.model.loss import linear_cross_entropy
from pdf2lora.params import Compute, Lora, Quantization, Train
from pdf2lora.tokens import IGNORED, Sequences, Window
from pdf2lora.training.optimizer import FlatParameter, clear_gradients


class PerplexityTrainer(Trainer):  # type: ignore[misc]
    """Trainer on a Forward: the loss never sees the logits of a whole batch, and validation is what evaluate does."""

    forward: Forward
    optimizer: Any = None
    validation_windows: Sequence[Window] = ()
    step: int = -1
    num_rows: int = 0  # of this optimizer step

    def training_step(self, model: PeftModel, inputs: dict[str, Tensor], num_items_in_batch: Tensor) -> Tensor:
        """Nats a target, over the targets of all batches that are accumulated into this optimizer step.

        Trainer's own would also call model.train(), which walks through a thousand modules while the GPU waits.
        """
        assert model.training
        inputs = self._prepare_inputs(inputs)
        if self.step != self.state.global_step:
            self.step, self.num_rows = self.state.global_step, 0
        self.forward.set_dropout(self.args.seed * 2**32 + self.step, first_row=self.num_rows)
        self.num_rows += len(inputs["input_ids"])
        hidden = self.forward(inputs["input_ids"])
        targets = inputs["labels"].roll(-1, dims=1)
        targets[:, -1] = IGNORED
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.forward.head, targets.flatten()) / num_items_in_batch
        self.accelerator.backward(loss)
        return loss.detach()

    def create_optimizer(self, model: PeftModel | None = None) -> Any:
        """The optimizer of train.optim, on all LoRA matrices at once."""
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            flat = FlatParameter(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            optimizer = optimizer_class([flat.parameter], weight_decay=self.args.weight_decay, **settings)
            optimizer.register_step_pre_hook(flat.gather_gradients)
            # what Trainer calls after each step, while the GPU waits
            self.model.zero_grad = partial(clear_gradients, flat.parameters)
            self.optimizer = optimizer
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Nats a token of the validation documents, by the code that scores the test documents."""
        nats = nats_per_document(
            self.forward,
            self.validation_windows,
            num_documents=1 + max(window.document for window in self.validation_windows),
            per_device_batch=self.args.per_device_eval_batch_size,
        )
        self.model.train()
        tokens = sum(int((window.targets != IGNORED).sum()) for window in self.validation_windows)
        metrics = {"eval_loss": float(nats.sum()) / tokens}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def build_model(base: Path, quantization: Quantization, lora: Lora, compute: Compute, *, seed: int) -> PeftModel:
    """The quantized base with new LoRA matrices, the same for the same seed.

    Raises:
        InputError: from model.py, where the machine cannot do what is asked.
    """
    model = load_base(base, quantization, compute)
    set_seed(seed)  # before the first LoRA matrix is drawn
    return add_lora(model, lora)


def build_trainer(
    model: PeftModel,
    sequences: Sequences,
    *,
    train: Train,
    compute: Compute,
    kernels: Kernels,
    gradient_checkpointing: str,
    per_device_batch: int,
    gradient_accumulation_steps: int,
    checkpoints: Path,
    validation_windows: Sequence[Window] = (),
    callbacks: Sequence[TrainerCallback] = (),
    max_steps: int | None = None,
) -> PerplexityTrainer:
    """A trainer ready to train the LoRA matrices of `model`: data and optimizer settings in place.

    gradient_checkpointing: one of SUPPORTED_GRADIENT_CHECKPOINTING[kernels].
    checkpoints: folder for checkpoint-<step>; written to only where max_steps is None.
    max_steps: optimizer steps of a probe; None trains num_train_epochs.
    """
    is_probe = max_steps is not None
    in_bfloat16 = compute_dtype(compute) == torch.bfloat16
    # accelerate asks the environment, where its launcher, or the user, may have left another precision
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if in_bfloat16 else "no"
    torch.use_deterministic_algorithms(compute.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check for bugs that writes all memory once more
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=per_device_batch,
        per_device_eval_batch_size=per_device_batch,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=train.num_train_epochs,
        max_steps=max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps if train.warmup_steps < 1 else int(train.warmup_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        bf16=in_bfloat16,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no" if is_probe else "steps",
        logging_steps=train.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number is shown; and to look for it is to wait for the GPU
        eval_strategy="steps" if validation_windows else "no",
        eval_steps=train.eval_steps,
        eval_on_start=bool(validation_windows),
        save_strategy="no" if is_probe else "steps",
        save_steps=train.save_steps,
        save_total_limit=2,
        seed=train.seed,
        report_to=[] if is_probe or train.report_to == "none" else [train.report_to],
        remove_unused_columns=False,
        disable_tqdm=True,  # tracking.py draws the progress bar
    )
    trainer = PerplexityTrainer(
        model=model,
        args=arguments,
        train_dataset=sequences,
        eval_dataset=list(validation_windows) or None,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.forward = build_forward(model, kernels, gradient_checkpointing)
    trainer.validation_windows = validation_windows
    model.train()
    return trainer


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of Sequences -> input_ids and labels, both (batch, seq_length)."""
    return {key: torch.stack([torch.from_numpy(row[key]) for row in rows]) for key in rows[0]}
