"""What find_batch's child process does: a probe is a training step, with what it takes of memory and time.

The parent knows these functions by their names (memory.Child): only the child imports torch, transformers and peft.
"""

import logging
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback

from pdf2lora.model.device import limit_gpu_memory
from pdf2lora.model.gradient_checkpointing import gradient_checkpointing_choices
from pdf2lora.model.kernel_choice import Kernels, choose_kernels
from pdf2lora.params import Params
from pdf2lora.runtime.monitor import device_name
from pdf2lora.tokens import Sequences
from pdf2lora.training.batch_search import Measurement
from pdf2lora.training.trainer import build_model, build_trainer


def possibilities(params: Params) -> tuple[str, Kernels, tuple[str, ...]]:
    """The device, the kernels that train will run on it, and the ways of gradient checkpointing to choose among.

    Raises:
        InputError: what params ask for cannot run here.
    """
    kernels = choose_kernels(params.compute, params.quantization, params.lora)
    return device_name(), kernels, gradient_checkpointing_choices(params.train, kernels)


@dataclass(frozen=True)
class Prepared:
    params: Params
    sequences: Sequences
    kernels: Kernels
    model: PeftModel
    free_gib: float  # of the GPU, before the model was loaded


def prepare(base: Path, params: Params, sequences: Sequences, kernels: Kernels) -> Prepared:
    """Loads the model that all probes train.

    Raises:
        InputError: from model.py, where the machine cannot do what is asked.
    """
    logging.disable()
    warnings.simplefilter("ignore")  # train says these things once, a probe need not
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
    model = build_model(base, params.quantization, params.lora, params.compute, seed=params.train.seed)
    return Prepared(params, sequences, kernels, model, free)


def free_gib(prepared: Prepared) -> float:
    return prepared.free_gib


def training_step(prepared: Prepared, gradient_checkpointing: str, batch: int, budget_gib: float) -> Measurement:
    """Peak and throughput of `find_batch.steps` optimizer steps: the step that train runs, nothing left out."""
    params, sequences = prepared.params, prepared.sequences
    limit_gpu_memory(budget_gib)
    rows = np.arange(batch * params.find_batch.steps) % len(sequences)
    clock = StepClock()
    with TemporaryDirectory() as folder, PeakMemory() as peak:
        build_trainer(
            prepared.model,
            Sequences(sequences.input_ids[rows], sequences.labels[rows]),
            train=params.train,
            compute=params.compute,
            kernels=prepared.kernels,
            gradient_checkpointing=gradient_checkpointing,
            per_device_batch=batch,
            gradient_accumulation_steps=1,
            checkpoints=Path(folder),
            callbacks=[clock],
            max_steps=params.find_batch.steps,
        ).train()
        return Measurement(round(peak.gib, 3), batch * params.compute.seq_length / clock.seconds_of_a_step)


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the steps after the first ones, which compile kernels and fill the allocator."""

    def __init__(self, steps_to_warm_up: int = 1) -> None:
        self.steps_to_warm_up = steps_to_warm_up
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds_of_a_step(self) -> float:
        return (self.ends[-1] - self.ends[self.steps_to_warm_up - 1]) / (len(self.ends) - self.steps_to_warm_up)


class PeakMemory:
    """Peak GiB of the tensors that exist inside the block, on the GPU or the CPU.

    On a GPU: what the allocator gave out. On a CPU: the bytes of all tensors, counted as operations make them and as
    they are freed. The resident size of the process would also hold the libraries and each kernel's scratch space,
    which differ from one CPU to the next; these bytes do not.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.counter = _TensorBytes()

    def __enter__(self) -> "PeakMemory":
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.on_gpu:
            self.counter.__exit__(*error)

    @property
    def gib(self) -> float:
        return float(torch.cuda.max_memory_allocated() if self.on_gpu else self.counter.peak) / 2**30


class _TensorBytes(TorchDispatchMode):
    """Sees every operation, its autograd and recomputation too, and follows the storages that come out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._follow, (args, result))
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.device.type == "cpu" and storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, num_bytes: int) -> None:
        self.now -= num_bytes
