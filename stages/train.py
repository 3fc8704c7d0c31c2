"""train: models/base, data/split/{train,validation}.jsonl, metrics/batch.json -> models/adapter/, metrics/train/

Checkpoints are in scratch, under a fingerprint of all that the adapter depends on: a run that was killed goes on from
its last checkpoint, and a run with other settings or data never finds it.
"""

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from peft import PeftModel

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.model.device import limit_gpu_memory
from pdf2lora.model.kernel_choice import choose_kernels
from pdf2lora.params import Params, read_params
from pdf2lora.runtime.files import atomic_directory
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.manifest import MANIFEST, require_intact
from pdf2lora.runtime.monitor import Meter, device_name, machine_metrics
from pdf2lora.runtime.processes import LOCK_TIMEOUT_S, single_instance
from pdf2lora.runtime.scratch import fingerprint, project_root, scratch_folder, stage_code
from pdf2lora.tokens import Encoder, Sequences, Window
from pdf2lora.training.checkpoints import CheckpointKeeper, latest_valid, step_of
from pdf2lora.training.tracking import DvcliveCallback, log_to_file, start_wandb
from pdf2lora.training.trainer import build_model, build_trainer

BASE = Path("models/base")
SIDES = Path("data/split")
BATCH = Path("metrics/batch.json")
ADAPTER = Path("models/adapter")
METRICS = Path("metrics/train")

log = logging.getLogger("train")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    require_one_process()
    require_reporter(params.train.report_to)
    require_intact(BASE, made_by="convert")
    log_file = log_to_file(project_root() / "logs")
    batch = json.loads(BATCH.read_text(encoding="utf-8"))
    sequences, looks = data(params.compute.seq_length)

    tokens_per_step = batch["effective_batch"] * params.compute.seq_length
    tracker = DvcliveCallback(METRICS, tokens_per_step=tokens_per_step)
    checkpoints = scratch_folder("train", run_fingerprint(params))
    with exclusive_lock(checkpoints, timeout_s=LOCK_TIMEOUT_S), machine_metrics("train") as machine:
        if params.train.report_to == "wandb":
            start_wandb(params)
        if batch["device"] != device_name():
            print(
                f"train: {BATCH} was measured on {batch['device']}, this is {device_name()}; "
                "`dvc repro -f -s find_batch` finds the fastest batch here"
            )
        kernels = choose_kernels(params.compute, params.quantization, params.lora)
        if batch["memory_gib"] != "auto":
            limit_gpu_memory(batch["memory_gib"])
        peft_model = build_model(BASE, params.quantization, params.lora, params.compute, seed=params.train.seed)
        trainer = build_trainer(
            peft_model,
            sequences,
            train=params.train,
            compute=params.compute,
            kernels=kernels,
            gradient_checkpointing=batch["gradient_checkpointing"],
            per_device_batch=batch["per_device_batch"],
            gradient_accumulation_steps=batch["gradient_accumulation_steps"],
            checkpoints=checkpoints,
            validation_windows=looks,
            callbacks=[tracker],
        )
        last_checkpoint = latest_valid(checkpoints)
        keeper = CheckpointKeeper(trainer, last_checkpoint)
        trainer.args.eval_on_start &= last_checkpoint is None  # the look at its step is in the checkpoint's history
        log_start(params, batch, trainer.model, last_checkpoint)
        first_step, meter = step_of(last_checkpoint), Meter()
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint)
        except torch.OutOfMemoryError as error:
            raise InputError(out_of_memory(trainer.state.global_step, checkpoints, error)) from error
        keeper.exit_if_interrupted()
        steps = trainer.state.global_step - first_step
        machine |= {
            "steps": steps,
            "kernels": kernels,
            "attention": peft_model.config._attn_implementation if kernels == "reference" else "flash (PyTorch)",
            **tracker.start_up(psutil.Process().create_time()),
            **meter.rates(steps * tokens_per_step),
            **tracker.throughput(peft_model.config, params.compute.seq_length),
        }

        with atomic_directory(ADAPTER) as folder:
            trainer.model.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in; report writes the card
        shutil.rmtree(checkpoints)  # the adapter is whole: a forced re-run trains again instead of loading its end
    print(
        f"train: {trainer.state.global_step} steps, {machine['tokens_per_s']:,} tokens/s; "
        f"log in {log_file.relative_to(project_root())}"
    )


def data(seq_length: int) -> tuple[Sequences, list[Window]]:
    """What is trained on, and the windows of the validation documents."""
    encoder = Encoder.of(BASE)
    encoder.require_context(seq_length)
    texts = {side: [d.text for d in read_documents(SIDES / f"{side}.jsonl")] for side in ("train", "validation")}
    looks = encoder.windows(encoder.encode(texts["validation"]), seq_length=seq_length, stride=seq_length)
    return encoder.sequences(texts["train"], seq_length=seq_length), looks


def log_start(params: Params, batch: dict[str, Any], peft_model: PeftModel, last_checkpoint: str | None) -> None:
    log.info("settings: %s", params.model_dump_json())
    log.info("batch: %s", batch)
    log.info("trainable parameters: %s", peft_model.get_nb_trainable_parameters())
    log.info("starts from %s", last_checkpoint or "the base model")


def out_of_memory(step: int, checkpoints: Path, error: torch.OutOfMemoryError) -> str:
    """In mid-run, where find_batch had found room: something else has taken it."""
    kept = latest_valid(checkpoints)
    return (
        f"train: the GPU ran out of memory in step {step + 1} ({str(error).split('.')[0]}); free it (nvidia-smi shows "
        "who uses it) and run dvc repro again, which goes on from "
        f"{f'the checkpoint of step {step_of(kept)}' if kept else 'the base model'}, "
        "or find a smaller batch: dvc repro -f -s find_batch"
    )


def run_fingerprint(params: Params) -> str:
    """Of everything that the adapter depends on."""
    libraries = [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")]
    ingredients = (params.quantization, params.lora, params.compute, params.train, BASE / MANIFEST, SIDES, BATCH)
    return fingerprint(*ingredients, *stage_code("train"), *libraries)


def require_one_process() -> None:
    processes = PartialState().num_processes
    if processes != 1:
        raise InputError(
            f"train: a launcher (accelerate launch, torchrun) started {processes} processes, one is supported; run "
            "dvc repro, or python -m stages.train"
        )


def require_reporter(report_to: str) -> None:
    if report_to == "wandb":
        try:
            version("wandb")
        except ImportError:
            raise InputError(
                "train.report_to: 'wandb' is not installed; run pip install wandb or choose 'none'"
            ) from None


if __name__ == "__main__":
    main()
