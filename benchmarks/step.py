"""Tokens/s and peak memory of one system's training step on the base model in models/base, at several batch sizes.

    python -m benchmarks.step <system> <gradient_checkpointing>:<batch> [...]

system            what it is
report            the source report's own configuration: PEFT's k-bit preparation, fp16 compute, sdpa, full logits
liger             transformers and PEFT with Liger's kernels, bfloat16, no k-bit preparation
unsloth           Unsloth's FastLanguageModel; `full` is its checkpointing with offload
reference, fused, fp8   this project's compute.kernels

All train LoRA (params.yaml: r, alpha, dropout, targets) on NF4 weights by transformers' Trainer with paged 8-bit AdamW
on random tokens; the first STEPS_TO_WARM_UP steps are not timed. One line of JSON for each batch. The peers
are built for one way of gradient checkpointing in a process.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

SYSTEM, *CASES = sys.argv[1:]
if SYSTEM == "unsloth":
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    import unsloth  # noqa: F401  # it wants to be imported first
    from unsloth import FastLanguageModel

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from pdf2lora.params import read_params
from pdf2lora.runtime.monitor import device_name
from pdf2lora.tokens import Sequences
from pdf2lora.training.probe import StepClock
from pdf2lora.training.throughput import model_flops_utilization

BASE = Path(os.environ.get("BASE", "models/base"))
STEPS, STEPS_TO_WARM_UP = 10, 4


def random_sequences(num_sequences: int, seq_length: int, vocabulary: int) -> Sequences:
    rows = np.random.default_rng(0).integers(0, vocabulary, size=(num_sequences, seq_length))
    return Sequences(rows, rows.copy())


def peer_model(params: Any, checkpointed: bool) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    lora = params.lora.model_dump()
    if SYSTEM == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            str(BASE),
            max_seq_length=params.compute.seq_length,
            load_in_4bit=True,
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        return FastLanguageModel.get_peft_model(
            model, use_gradient_checkpointing="unsloth" if checkpointed else False, random_state=0, **lora
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if SYSTEM == "report" else torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        BASE,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
        quantization_config=quantization,
        local_files_only=True,
    )
    model.config.use_cache = False
    if SYSTEM == "report":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointed, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        model.requires_grad_(False)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        _apply_liger_kernel_to_instance(model=model)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def peer_trainer(model: Any, sequences: Sequences, batch: int, clock: StepClock, checkpointed: bool) -> Trainer:
    checkpointed &= SYSTEM != "unsloth"  # which has its own
    arguments = TrainingArguments(
        output_dir=mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        bf16=True,
        optim="paged_adamw_8bit",
        learning_rate=2e-4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        gradient_checkpointing=checkpointed,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointed else None,
    )
    return Trainer(model=model, args=arguments, train_dataset=sequences, data_collator=collate_all, callbacks=[clock])


def collate_all(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from pdf2lora.training.trainer import collate

    batch = collate(rows)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def trainers(params: Any) -> Iterator[tuple[str, int, Trainer, StepClock]]:
    """One for each batch, on one model that is loaded once."""
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    if SYSTEM in ("report", "liger", "unsloth"):
        checkpointed = not CASES[0].startswith("none")
        assert all(case.startswith("none") != checkpointed for case in CASES)
        model = peer_model(params, checkpointed)
    else:
        from pdf2lora.training.trainer import build_model, build_trainer

        model = build_model(BASE, params.quantization, params.lora, params.compute, seed=params.train.seed)
    for checkpointing, batch in ((name, int(number)) for name, number in (case.split(":") for case in CASES)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        sequences = random_sequences(batch * STEPS, params.compute.seq_length, vocabulary)
        clock = StepClock(STEPS_TO_WARM_UP)
        if SYSTEM in ("report", "liger", "unsloth"):
            yield checkpointing, batch, peer_trainer(model, sequences, batch, clock, checkpointed), clock
        else:
            trainer = build_trainer(
                model,
                sequences,
                train=params.train,
                compute=params.compute,
                kernels=SYSTEM,
                gradient_checkpointing=checkpointing,
                per_device_batch=batch,
                gradient_accumulation_steps=1,
                checkpoints=Path(mkdtemp()),
                callbacks=[clock],
                max_steps=STEPS,
            )
            yield checkpointing, batch, trainer, clock


def main() -> None:
    params = read_params()
    for checkpointing, batch, trainer, clock in trainers(params):
        row = {"system": SYSTEM, "gradient_checkpointing": checkpointing, "batch": batch}
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            print(json.dumps(row | {"tokens_per_s": None}), flush=True)
            return
        tokens_per_s = batch * params.compute.seq_length / clock.seconds_of_a_step
        utilization = model_flops_utilization(
            tokens_per_s, trainer.model.config, params.compute.seq_length, device_name()
        )
        row |= {
            "tokens_per_s": round(tokens_per_s),
            "model_flops_utilization": utilization and round(utilization, 3),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
        print(json.dumps(row), flush=True)
        del trainer


if __name__ == "__main__":
    main()
