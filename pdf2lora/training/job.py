"""The stage train in one of its processes: reads data and batch plan, trains, writes the adapter.

Checkpoints are in .scratch, in a folder whose name is a fingerprint of everything that the adapter depends on. A killed
run resumes from its last checkpoint. A run with other settings, data or code has another folder.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import PeftModel

from pdf2lora.errors import InputError
from pdf2lora.model.device import limit_gpu_memory
from pdf2lora.model.gradient_checkpointing import SUPPORTED_GRADIENT_CHECKPOINTING
from pdf2lora.model.initialization import INITIAL, initialize
from pdf2lora.model.kernel_choice import choose_kernels
from pdf2lora.model.kernels.offload import HostOutOfMemory
from pdf2lora.model.loading import add_lora, load_base, read_config
from pdf2lora.params import Params, Placement
from pdf2lora.paths import ADAPTER, BASE, BATCH, TOKENS
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.files import atomic_directory
from pdf2lora.runtime.launcher import Stopped
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.runtime.monitor import device_name, machine_metrics
from pdf2lora.runtime.scratch import fingerprint, project_root, scratch_folder, stage_code
from pdf2lora.token_files import TokenFile
from pdf2lora.tokens import MixedSequences, Sequences, Window, require_context
from pdf2lora.training.checkpoints import latest_valid, remove_contents, step_of
from pdf2lora.training.data_order import DataOrder
from pdf2lora.training.interrupt import Interrupt
from pdf2lora.training.loop import BatchPlan, Learner, TrainingResult, train
from pdf2lora.training.schedule import schedule_warnings
from pdf2lora.training.throughput import model_flops_utilization
from pdf2lora.training.tracking import Tracker, Trackers, log_to_file, require_trackers

METRICS = Path("metrics/train")
SAME_TRAINING_TIMEOUT_S = 7 * 24 * 3600.0  # another experiment that trains the same adapter ends first

log = logging.getLogger("train")


def run(params: Params, require_base: Callable[[], None] | None) -> None:
    """Trains with all processes of the job; the main one writes models/adapter and metrics/train.

    require_base: waits for the check of the base model's files (manifest.start_check); None in the other processes.

    Raises:
        InputError: the machine or the settings do not allow it, or memory ran out.
        Stopped: a signal stopped the training before its last step; a checkpoint was saved.
    """
    processes = Processes()
    processes.leave_output_to_main()
    names = tracker_names(params)
    require_trackers(names)
    batch = json.loads(BATCH.read_text(encoding="utf-8"))
    if require_base:
        require_base()
    if processes.is_main:
        log_file = log_to_file(project_root() / "logs")
    corpus, replay, validation_windows = read_data(params)
    sequences = MixedSequences(corpus, replay) if len(replay) else corpus
    plan = batch_plan(params, batch, processes)
    checkpoints = scratch_folder("train", run_fingerprint(params, plan))
    with ExitStack() as lock:
        if processes.is_main:
            lock.enter_context(exclusive_lock(checkpoints, timeout_s=SAME_TRAINING_TIMEOUT_S))
        with ExitStack() as stack:
            machine: dict[str, Any] = stack.enter_context(machine_metrics("train")) if processes.is_main else {}
            learner, order = build_learner(params, plan, corpus, replay, batch, checkpoints, processes)
            first_epoch = np.concatenate([order.indices(step) for step in range(order.steps_per_epoch)])
            tokens_per_step = sequences.num_targets(first_epoch) / order.steps_per_epoch  # steps can be smaller
            trackers = Trackers(params, names) if names and processes.is_main else None
            tracker = Tracker(METRICS, processes, trackers, tokens_per_step=tokens_per_step)
            log.info("settings: %s", params.model_dump_json())
            log.info("processes: %d; batch: %s", processes.count, batch)
            log.info("trainable parameters: %s", learner.model.get_nb_trainable_parameters())
            interrupt = stack.enter_context(Interrupt())
            try:
                result = train(
                    learner,
                    sequences,
                    order=order,
                    validation_windows=validation_windows,
                    checkpoints=checkpoints,
                    tracker=tracker,
                    interrupt=interrupt,
                )
            except torch.OutOfMemoryError as error:
                raise InputError(out_of_memory(checkpoints, error, processes)) from error
            if result.stopped_by:
                raise Stopped(
                    f"train: stopped by {result.stopped_by} after step {result.steps}; a checkpoint is saved, and "
                    "dvc repro resumes from it"
                )
            if processes.is_main:
                save_adapter(learner.model, params, checkpoints)
            machine |= measurements(learner, params, tracker, result)
        if processes.is_main:
            remove_contents(checkpoints)  # so that a forced run trains again
    if processes.is_main:
        kept = f", kept step {result.kept_step}" if result.kept_step != result.steps else ""
        early = f" of {order.num_steps} (early stopping)" if result.steps < order.num_steps else ""
        print(
            f"train: {result.steps} steps{early}{kept}, {machine['tokens_per_s']:,} tokens/s; "
            f"log in {log_file.relative_to(project_root())}"
        )
    processes.end()


def build_learner(
    params: Params,
    plan: BatchPlan,
    corpus: Sequences,
    replay: Sequences,
    batch: dict[str, Any],
    checkpoints: Path,
    processes: Processes,
) -> tuple[Learner, DataOrder]:
    """The model with its initial adapter and its optimizer, and the order of the sequences.

    batch: the content of metrics/batch.json.
    """
    if batch["memory_gib"] != "auto":
        limit_gpu_memory(batch["memory_gib"])
    epochs, seed, replay_share = params.train.num_train_epochs, params.train.seed, params.train.replay_share
    order = DataOrder(len(corpus), plan.effective_batch, epochs, seed, len(replay), replay_share)
    if processes.is_main:
        warnings = schedule_warnings(
            params.train, num_sequences=order.num_in_epoch, effective_batch=plan.effective_batch
        )
        print(*(f"train: warning: {text}" for text in warnings), sep="\n", end="\n" if warnings else "")
    model = build_model(BASE, params, processes, batch["placement"])
    if params.lora.reads_weights:
        initialize(model, BASE, params.lora, seed=seed, folder=checkpoints / INITIAL, processes=processes)
    learner = Learner(
        model, train=params.train, compute=params.compute, plan=plan, num_steps=order.num_steps, processes=processes
    )
    return learner, order


def batch_plan(params: Params, batch: dict[str, Any], processes: Processes) -> BatchPlan:
    """The plan of metrics/batch.json with the kernels of this machine.

    Raises InputError if it was measured with other kernels, which support another gradient checkpointing.
    """
    if processes.is_main and batch["device"] != device_name():
        print(
            f"train: {BATCH} was measured on {batch['device']}, and this is {device_name()}. "
            "`dvc repro -f -s find_batch` finds the fastest batch here."
        )
    kernels = choose_kernels(params.compute, params.quantization, params.lora, read_config(BASE))
    if batch["gradient_checkpointing"] not in SUPPORTED_GRADIENT_CHECKPOINTING[kernels]:
        raise InputError(
            f"train: {BATCH} has gradient_checkpointing {batch['gradient_checkpointing']!r}, which the {kernels} "
            "kernels of this machine do not support. Measure here: dvc repro -f -s find_batch"
        )
    return BatchPlan(kernels, batch["gradient_checkpointing"], batch["per_device_batch"], batch["effective_batch"])


def save_adapter(model: PeftModel, params: Params, checkpoints: Path) -> None:
    """Writes models/adapter."""
    with atomic_directory(ADAPTER) as folder:
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; report writes the model card
        if params.lora.reads_weights:
            shutil.copytree(checkpoints / INITIAL, folder / INITIAL)


def tracker_names(params: Params) -> list[str]:
    names = params.train.report_to
    return [] if names == "none" else [names] if isinstance(names, str) else list(names)


def build_model(
    base: Path, params: Params, processes: Processes | None = None, placement: Placement | None = None
) -> PeftModel:
    """The quantized base model with new LoRA matrices, which depend on train.seed; B is zero.

    find_batch measures this model: lora.init_lora_weights changes neither the time nor the memory of a step.

    processes, placement: see load_base.

    Raises InputError if the settings need something that this machine does not have.
    """
    model = load_base(base, params.quantization, params.compute, placement=placement, processes=processes)
    torch.manual_seed(params.train.seed)  # before the first LoRA matrix is drawn
    return add_lora(model, params.lora)


def read_data(params: Params) -> tuple[Sequences, Sequences, list[Window]]:
    """The training sequences of the corpus, those of the replay text, and the windows of the validation documents."""
    seq_length = params.compute.seq_length
    require_context(BASE, {"compute.seq_length": seq_length})
    windows = TokenFile.open(TOKENS, "validation").windows(seq_length=seq_length, stride=seq_length)
    corpus, replay = (TokenFile.open(TOKENS, name).sequences(seq_length) for name in ("train", "replay"))
    return corpus, replay, windows


def measurements(learner: Learner, params: Params, tracker: Tracker, result: TrainingResult) -> dict[str, Any]:
    """The measurements of this run for metrics/machine.json. All processes must call it, because it gathers values."""
    model, plan, processes = learner.model, learner.plan, learner.processes
    numbers: dict[str, Any] = {
        "num_processes": processes.count,
        "steps": result.steps - result.first_step,
        "tokens_per_s": 0,
        "kernels": plan.kernels,
        "attention": model.config._attn_implementation if plan.kernels == "reference" else "flash (PyTorch)",
    }
    if tracker.first_step_at:
        began = psutil.Process(os.getppid() if processes.count > 1 else os.getpid()).create_time()
        numbers["seconds_to_first_step"] = round(tracker.first_step_at - began, 1)
        numbers["tokens_per_s"] = round(result.num_targets / tracker.seconds)
    if tracker.median_step_s:
        tokens_per_s = result.num_targets / (result.steps - result.first_step) / tracker.median_step_s
        utilization = model_flops_utilization(
            tokens_per_s / processes.count, model, params.compute.seq_length, device_name()
        )
        numbers["step_tokens_per_s"] = round(tokens_per_s)
        numbers["model_flops_utilization"] = utilization and round(utilization, 3)
    if torch.cuda.is_available():
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        allocated, reserved = (max(values) for values in zip(*processes.gather(peaks), strict=True))
        numbers["peak_allocated_gib"] = round(allocated / 2**30, 2)
        numbers["peak_reserved_gib"] = round(reserved / 2**30, 2)
    return numbers


def out_of_memory(checkpoints: Path, error: torch.OutOfMemoryError, processes: Processes) -> str:
    """The message for a GPU or a host without memory during training: another program took it after find_batch."""
    checkpoint = latest_valid(checkpoints, remove_corrupt=False)
    resumes = f"the checkpoint of step {step_of(checkpoint)}" if checkpoint else "the base model"
    whose = f" of process {processes.index} of {processes.count}" if processes.count > 1 else ""
    if isinstance(error, HostOutOfMemory):
        memory, cause, tool = "host", str(error), "top"
    else:
        memory, cause, tool = "GPU", str(error).split(".")[0], "nvidia-smi"
    return (
        f"train: the {memory}{whose} ran out of memory ({cause}). Free it ({tool} shows who uses it) and run dvc repro "
        f"again, which resumes from {resumes}, or find a smaller batch: dvc repro -f -s find_batch"
    )


def run_fingerprint(params: Params, plan: BatchPlan) -> str:
    """A fingerprint of everything that the adapter depends on.

    It does not depend on the number of processes and on the division of a step, which change only rounding, and not on
    trackers and the distance of checkpoints.
    """
    libraries = [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")]
    compute = params.compute.model_dump(exclude={"num_processes"})
    train_settings = params.train.model_dump(exclude={"report_to", "save_steps"})
    settings = (params.quantization, params.lora, compute, train_settings, plan.kernels, plan.effective_batch)
    return fingerprint(*settings, BASE / MANIFEST, TOKENS, *stage_code("train"), *libraries)
