"""The training loop for one or several processes. Read train() from top to bottom.

Settings (params.yaml), their effects and trade-offs:

- train.effective_batch: sequences of one optimizer step. The number of processes, the per-device batch and gradient
  accumulation only divide it. They change time and memory; they change the result only by rounding.
- train.num_train_epochs: passes over the sequences; a fraction ends in the middle of an epoch. Each epoch has a new
  order, which depends only on train.seed.
- train.learning_rate, lr_scheduler_type, warmup_steps: the schedule is transformers' get_scheduler.
- train.optim, weight_decay: bitsandbytes' AdamW in 8 or 32 bits, paged or not, or PyTorch's. Paged moments move to host
  memory when the GPU is full. All LoRA matrices are one flat parameter (optimizer.py).
- train.max_grad_norm: clips the norm of the whole gradient.
- compute.compute_dtype: float16 scales the loss. A step whose gradients overflow changes nothing and halves the scale.
- compute.kernels, train.gradient_checkpointing: how a micro-batch is computed; find_batch measures and chooses. The
  fused and fp8 kernels run as one CUDA graph, except with offload (micro_batch.py).
- compute.deterministic: two runs with the same number of processes give the same bytes on one kind of GPU. On a CPU
  they always do.
- train.eval_steps: validates every eval_steps steps, before the first step and after the last one. Each process scores
  whole batches of windows.
- train.keep: `last` keeps the adapter of the last step, `best` the one with the lowest validation loss.
- train.early_stopping_patience: stops after this number of validations in a row without a new lowest loss; `none` never
  stops early.
- train.replay, replay_share: mixes replay text into each epoch, so an epoch has more steps. Each token has the same
  weight in the loss. The data order includes the replay text: a resumed training and several processes see the same.
- train.logging_steps: the loss is the mean over the steps since the last log entry (progress.py).
- train.save_steps: saves a checkpoint every save_steps steps. SIGTERM, Ctrl-C and the end of the terminal save one too.
- train.report_to: accelerate's trackers, in addition to dvclive (tracking.py).

Data parallelism: each process holds the whole quantized base and computes its part of a step's sequences. The loss of a
sequence is divided by the number of targets in the whole step. So the sum over the processes is the step's mean loss,
even if the parts differ in size. One all-reduce of the flat float32 buffer per step sums gradients, loss and stop
requests. DistributedDataParallel is not used, because the fused kernels bypass its hooks.

Refused: train.keep=best or early stopping without validation documents; processes whose adapters differ.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import get_scheduler

from pdf2lora.errors import InputError
from pdf2lora.evaluation.scoring import nats_per_token
from pdf2lora.model.forward import Forward, build_forward
from pdf2lora.model.kernel_choice import Kernels
from pdf2lora.params import Compute, Train
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import MixedSequences, Sequences, Window
from pdf2lora.training.checkpoints import latest_valid, load_checkpoint, save_checkpoint
from pdf2lora.training.data_order import DataOrder, Indices, micro_batches
from pdf2lora.training.interrupt import Interrupt
from pdf2lora.training.micro_batch import MicroBatch, graph_obstacle
from pdf2lora.training.optimizer import FlatParameters, build_optimizer
from pdf2lora.training.progress import Progress, StepLog, StepNumbers
from pdf2lora.training.schedule import num_warmup_steps
from pdf2lora.training.tracking import Tracker

MIN_LOSS_SCALE = 2.0**-10  # the scale gets smaller than this only if the gradients of every step overflow
VALIDATION_BATCH = 8  # windows; few, because a CUDA graph keeps the memory of the training step

log = logging.getLogger("train")


@dataclass(frozen=True)
class BatchPlan:
    """The division of a step into micro-batches, and their kernels; from metrics/batch.json."""

    kernels: Kernels
    gradient_checkpointing: str
    per_device_batch: int
    effective_batch: int


@dataclass(frozen=True)
class TrainingResult:
    """steps: of the whole training; first_step: steps before this run; kept_step: the step whose adapter is kept."""

    steps: int
    first_step: int
    kept_step: int
    num_targets: int  # tokens that this run trained on
    stopped_by: str | None  # a signal's name


class Learner:
    """The model, its optimizer and its learning rate schedule. train runs step(), and find_batch measures it."""

    def __init__(
        self, model: PeftModel, *, train: Train, compute: Compute, plan: BatchPlan, num_steps: int, processes: Processes
    ):
        torch.use_deterministic_algorithms(compute.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check, slow
        self.model, self.train, self.plan, self.processes = model, train, plan, processes
        self.forward: Forward = build_forward(model, plan.kernels, plan.gradient_checkpointing)
        self.parameters = FlatParameters(p for p in model.parameters() if p.requires_grad)
        self.optimizer = build_optimizer(self.parameters.parameter, train)
        self.scheduler = get_scheduler(
            train.lr_scheduler_type, self.optimizer, num_warmup_steps(train.warmup_steps, num_steps), num_steps
        )
        head = self.forward.head
        self.scaler = torch.amp.GradScaler(head.device.type, enabled=head.dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=head.device))  # creates the scale, which step() multiplies itself
        obstacle = graph_obstacle(plan.kernels, plan.gradient_checkpointing)
        log.info("CUDA graph: %s", f"no, {obstacle}" if obstacle else "yes")
        self.micro_batch = MicroBatch(
            self.forward,
            self.parameters,
            size=plan.per_device_batch,
            seq_length=compute.seq_length,
            graph_obstacle=obstacle,
        )
        model.train()

    def step(
        self, sequences: Sequences | MixedSequences, indices: Indices, number: int, *, stop_requested: bool = False
    ) -> torch.Tensor:
        """Makes one optimizer step on the sequences with these indices. Returns the gradient's norm before clipping.

        Afterwards parameters.loss is the step's mean loss over all processes.
        number: of the step, from 0; the dropout masks depend on it.
        """
        processes, parameters = self.processes, self.parameters
        parameters.buffer.zero_()
        num_targets = sequences.num_targets(indices)
        scale = self.scaler.get_scale() / num_targets if self.scaler.is_enabled() else 1 / num_targets
        if scale * num_targets < MIN_LOSS_SCALE:
            raise InputError(
                "train: the gradients overflow in float16 at any loss scale. Use compute.compute_dtype=float32."
            )
        seed = dropout_seed(self.train.seed, number)
        parts = micro_batches(
            indices, self.plan.per_device_batch, process=processes.index, num_processes=processes.count
        )
        for part in parts:
            inputs, targets = map(torch.from_numpy, sequences.batch(part.indices))
            self.micro_batch(inputs, targets, scale=scale, seed=seed, first_sequence=part.first_sequence)
        if stop_requested:
            parameters.stop_requests.fill_(1)
        processes.sum_(parameters.buffer)
        if self.scaler.is_enabled():
            parameters.loss.div_(self.scaler.get_scale())
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_([parameters.parameter], self.train.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return norm

    def validate(self, windows: Sequence[Window]) -> float:
        """Mean nats per token of the validation windows."""
        nats = nats_per_token(self.forward, windows, per_device_batch=VALIDATION_BATCH, processes=self.processes)
        self.model.train()
        return nats

    @property
    def is_asynchronous(self) -> bool:
        """True if step() returns before the GPU has computed the step."""
        return not self.micro_batch.graph_obstacle

    def state(self) -> dict[str, Any]:
        parameters = self.parameters.parameter.detach().cpu()  # waits for the GPU, so the host can read paged moments
        return {
            "parameters": parameters,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        self.parameters.parameter.copy_(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # empty if the training began in another dtype, on another GPU
            self.scaler.load_state_dict(state["scaler"])


def train(
    learner: Learner,
    sequences: Sequences | MixedSequences,
    *,
    order: DataOrder,
    validation_windows: Sequence[Window],
    checkpoints: Path,
    tracker: Tracker,
    interrupt: Interrupt,
) -> TrainingResult:
    """Trains to the last step, or until a signal or early stopping. The model then has the adapter that is kept."""
    settings, processes, parameters = learner.train, learner.processes, learner.parameters
    progress, best = Progress(), None

    # Resume. Only the main process reads the checkpoint, because the other nodes may have another disk.
    checkpoint = latest_valid(checkpoints, remove_corrupt=True) if processes.is_main else None
    state = processes.broadcast(load_checkpoint(checkpoint) if checkpoint else None)
    if state is not None:
        learner.load_state(state)
        progress, best = Progress(**state["progress"]), state["best"]
    log.info("starts from %s", checkpoint or "the base model")
    processes.require_equal(parameters.parameter, "the initial adapter")
    tracker.start(progress.history, progress.step, order.num_steps)
    first_step, num_targets = progress.step, 0
    stopped_by: str | None = None
    step_log = StepLog(progress, tracker, settings.logging_steps)

    def validate() -> None:
        nonlocal best
        loss = learner.validate(validation_windows)
        tracker.log(progress.history, {"step": progress.step, "validation/loss": loss})
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.validations_without_best = loss, progress.step, 0
            best = parameters.parameter.detach().cpu().clone() if settings.keep == "best" else None
        else:
            progress.validations_without_best += 1

    def save() -> None:
        processes.require_equal(parameters.parameter, f"the adapter after step {progress.step}")
        if processes.is_main:
            save_checkpoint(checkpoints, progress.step, learner.state() | {"progress": vars(progress), "best": best})

    def is_last() -> bool:
        patience = settings.early_stopping_patience
        is_stopped_early = patience != "none" and progress.validations_without_best >= patience
        return progress.step >= order.num_steps or is_stopped_early

    if validation_windows and progress.step == 0:
        validate()
    while not is_last():
        tracker.begin_step()
        indices = order.indices(progress.step)
        norm = learner.step(sequences, indices, progress.step, stop_requested=interrupt.received is not None)
        num_targets += sequences.num_targets(indices)
        progress.step += 1
        numbers = StepNumbers(progress.step, learner.scheduler.get_last_lr()[0], parameters, norm)
        step_log.add(numbers, read_now=not learner.is_asynchronous)
        tracker.end_step()
        if validation_windows and (progress.step % settings.eval_steps == 0 or progress.step == order.num_steps):
            step_log.read_all()
            validate()
        if is_last():
            step_log.finish(numbers)
        stopped_by = stop_signal(step_log.stop_requests, processes, interrupt)
        if progress.step % settings.save_steps == 0 or stopped_by:
            step_log.read_all()
            save()
        if stopped_by:
            break
    if is_last():  # the signal came in the last step
        stopped_by = None
    kept_step = progress.step
    if settings.keep == "best" and best is not None and not stopped_by:
        with torch.no_grad():
            parameters.parameter.copy_(best)
        kept_step = progress.best_step
    processes.require_equal(parameters.parameter, "the trained adapter")
    tracker.end(
        kept_step if kept_step != progress.step else None,
        replay_share(sequences, order, progress.step) if isinstance(sequences, MixedSequences) else None,
        order.num_steps if progress.step < order.num_steps and not stopped_by else None,
    )
    return TrainingResult(progress.step, first_step, kept_step, num_targets, stopped_by)


def replay_share(sequences: MixedSequences, order: DataOrder, num_steps: int) -> float:
    """The share of replay text in the tokens that the first num_steps steps trained on."""
    indices = np.concatenate([order.indices(step) for step in range(num_steps)])
    return sequences.num_replay_targets(indices) / sequences.num_targets(indices)


def stop_signal(stop_requests: float, processes: Processes, interrupt: Interrupt) -> str | None:
    """The signal that stops the training after this step, or None.

    stop_requests: of a step that all processes have read, so that all of them stop after the same step.
    """
    if processes.count == 1:
        return interrupt.received.name if interrupt.received else None
    if not stop_requests:
        return None
    return interrupt.received.name if interrupt.received else "a signal to another process"


def dropout_seed(seed: int, step: int) -> int:
    """A 62-bit seed for the dropout masks of one optimizer step."""
    return int.from_bytes(hashlib.sha256(f"dropout {seed} {step}".encode()).digest()[:8]) >> 2
