"""Measures tokens/s and peak memory of one system's training step on models/base, at several batch sizes.

    python -m benchmarks.step <system> <gradient_checkpointing>:<batch> [...]

system            description
report            the source report's configuration: PEFT's k-bit preparation, fp16 compute, sdpa, full logits
liger             transformers and PEFT with Liger's kernels, bfloat16, no k-bit preparation
unsloth           Unsloth's FastLanguageModel; `full` is its checkpointing with offload
reference, fused, fp8   this project's compute.kernels

All systems train LoRA (params.yaml: r, alpha, dropout, targets) on NF4 weights with paged 8-bit AdamW on random tokens.
This project uses the step of its training loop, the others use transformers' Trainer without log entries. The first
STEPS_TO_WARM_UP steps are not timed. Between the timed steps, this script never waits for the GPU. Prints one line of
JSON for each batch. report, liger and unsloth need one process for `none` and one for `full`.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

SYSTEM, *CASES = sys.argv[1:] or [""]
if SYSTEM == "unsloth":
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    import unsloth  # noqa: F401  # must be imported first
    from unsloth import FastLanguageModel

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pdf2lora.params import Params, read_params
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.monitor import device_name
from pdf2lora.tokens import Sequences, Tokens
from pdf2lora.training.job import build_model
from pdf2lora.training.loop import BatchPlan, Learner
from pdf2lora.training.throughput import model_flops_utilization

BASE = Path(os.environ.get("BASE", "models/base"))
STEPS, STEPS_TO_WARM_UP = 10, 4


AfterStep = Callable[[int], None]  # receives the number of finished steps


class Case(NamedTuple):
    """run: does STEPS optimizer steps of `batch` sequences."""

    gradient_checkpointing: str
    batch: int
    model: Any
    run: Callable[[AfterStep], None]


def random_tokens(num_sequences: int, seq_length: int) -> Tokens:
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, size=(num_sequences, seq_length))


def peer_model(params: Params, is_checkpointed: bool) -> Any:
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
            model, use_gradient_checkpointing="unsloth" if is_checkpointed else False, random_state=0, **lora
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
            model, use_gradient_checkpointing=is_checkpointed, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        model.requires_grad_(False)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        _apply_liger_kernel_to_instance(model=model)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


class CallAfterStep(TrainerCallback):
    def __init__(self, after_step: AfterStep):
        self.after_step = after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step(state.global_step)


def run_peer(model: Any, params: Params, gradient_checkpointing: str, batch: int, after_step: AfterStep) -> None:
    is_checkpointed = gradient_checkpointing != "none" and SYSTEM != "unsloth"  # which has its own
    arguments = TrainingArguments(
        output_dir=mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        bf16=True,
        optim="paged_adamw_8bit",
        learning_rate=2e-4,
        logging_strategy="no",
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        gradient_checkpointing=is_checkpointed,
        gradient_checkpointing_kwargs={"use_reentrant": False} if is_checkpointed else None,
    )
    rows = torch.from_numpy(random_tokens(batch * STEPS, params.compute.seq_length))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows],
        data_collator=lambda examples: {key: torch.stack([e[key] for e in examples]) for key in examples[0]},
        callbacks=[CallAfterStep(after_step)],
    )
    trainer.train()


def run_learner(model: Any, params: Params, gradient_checkpointing: str, batch: int, after_step: AfterStep) -> None:
    """Steps of the training loop, with a CUDA graph where train uses one."""
    seq_length = params.compute.seq_length
    sequences = Sequences(random_tokens(1, batch * STEPS * seq_length + 1)[0].astype(np.int32), seq_length)
    learner = Learner(
        model,
        train=params.train,
        compute=params.compute,
        plan=BatchPlan(SYSTEM, gradient_checkpointing, batch, batch),  # type: ignore[arg-type]
        num_steps=STEPS,
        processes=Processes(),
    )
    for number, indices in enumerate(np.arange(batch * STEPS).reshape(STEPS, batch)):
        learner.step(sequences, indices, number)
        after_step(number + 1)


def cases(params: Params) -> Iterator[Case]:
    """The cases of the command line, on one model."""
    is_peer = SYSTEM in ("report", "liger", "unsloth")
    if is_peer:
        is_checkpointed = not CASES[0].startswith("none")
        assert all(case.startswith("none") != is_checkpointed for case in CASES)
        model = peer_model(params, is_checkpointed)
    else:
        model = build_model(BASE, params)
    for gradient_checkpointing, batch in (case.split(":") for case in CASES):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = run_peer if is_peer else run_learner
        yield Case(
            gradient_checkpointing,
            int(batch),
            model,
            partial(run, model, params, gradient_checkpointing, int(batch)),
        )


def main() -> None:
    params = read_params()
    for case in cases(params):
        row = {"system": SYSTEM, "gradient_checkpointing": case.gradient_checkpointing, "batch": case.batch}
        ends: list[float] = []

        def record_end(step: int, ends: list[float] = ends) -> None:
            if step in (STEPS_TO_WARM_UP, STEPS):
                torch.cuda.synchronize()
                ends.append(time.perf_counter())

        try:
            case.run(record_end)
        except torch.OutOfMemoryError:
            print(json.dumps(row | {"tokens_per_s": None}), flush=True)
            return
        seq_length = params.compute.seq_length
        step_s = (ends[1] - ends[0]) / (STEPS - STEPS_TO_WARM_UP)
        tokens_per_s = case.batch * seq_length / step_s
        utilization = model_flops_utilization(tokens_per_s, case.model, seq_length, device_name())
        row |= {
            "tokens_per_s": round(tokens_per_s),
            "model_flops_utilization": utilization and round(utilization, 3),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
