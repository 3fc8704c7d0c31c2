"""A probe measures the peak memory and the time of a few optimizer steps at one micro-batch size.

It runs the same step as train, in the same number of processes. If one process runs out of memory, the others must not
wait for it in a collective. So that process still joins one all-reduce, with a buffer of NaN, which all processes see.
"""

import gc
import logging
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pdf2lora.model.device import compute_dtype, limit_gpu_memory
from pdf2lora.model.gradient_checkpointing import gradient_checkpointing_choices
from pdf2lora.model.kernel_choice import choose_kernels, reference_reason
from pdf2lora.model.loading import read_config
from pdf2lora.model.packed_base import possible_placements, resident_gib
from pdf2lora.params import Params, Placement
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.monitor import device_name
from pdf2lora.tokens import Sequences, Window, windows
from pdf2lora.training.batch_search import Measurement
from pdf2lora.training.job import BASE, build_model
from pdf2lora.training.loop import VALIDATION_BATCH, BatchPlan, Learner
from pdf2lora.training.probe_processes import Capabilities, OutOfMemory

WARM_UP_STEPS = 1  # not timed: they compile kernels and fill the allocator
MAX_LEFT_BYTES = 64 * 2**20  # if a failed probe leaves more reserved memory than this, the next one gets a new process


class Prober:
    """Measures probes of one model in one process of the job."""

    def __init__(self, params: Params):
        logging.disable()
        warnings.simplefilter("ignore")  # train shows them
        self.params = params
        self.processes = Processes()
        self.model: Any = None
        self.placement: Placement | None = None  # of self.model
        self.reserved_bytes = 0  # after the last successful probe; includes the workspaces that cuBLAS keeps

    def capabilities(self) -> Capabilities:
        """Raises InputError if the settings need something that this machine cannot run."""
        quantization, config, dtype = self.params.quantization, read_config(BASE), compute_dtype(self.params.compute)
        kernels = choose_kernels(self.params.compute, quantization, self.params.lora, config)
        free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
        return Capabilities(
            device=device_name(),
            kernels=kernels,
            gradient_checkpointing=tuple(
                choice.value for choice in gradient_checkpointing_choices(self.params.train, kernels)
            ),
            free_gib=min(self.processes.gather(free)),
            placements=possible_placements(BASE, config, quantization, self.params.lora, dtype),
            resident_gib=resident_gib(BASE, quantization, dtype),
            reference_reason=reference_reason(self.params.compute, quantization, self.params.lora, config),
        )

    def measure(
        self,
        base: Path,
        sequences: Sequences,
        gradient_checkpointing: str,
        batch: int,
        budget_gib: float,
        placement: Placement,
    ) -> Measurement | OutOfMemory:
        """Runs find_batch.steps optimizer steps. Measures the largest peak of a process, and the throughput of all."""
        limit_gpu_memory(budget_gib)
        if placement != self.placement:
            self.model, self.placement = None, placement
            _reserved_bytes()  # frees the memory of the earlier model
        with suppress(torch.OutOfMemoryError):
            if self.model is None:
                self.model = build_model(base, self.params, self.processes, placement)
        measurement = None
        if all(self.processes.gather(self.model is not None)):
            measurement = self._measure(base, sequences, gradient_checkpointing, batch, budget_gib)
        if measurement is not None:
            self.reserved_bytes = _reserved_bytes()
            return measurement
        is_clean = torch.cuda.is_available() and _reserved_bytes() - self.reserved_bytes < MAX_LEFT_BYTES
        return OutOfMemory(all(self.processes.gather(is_clean)))

    def _measure(
        self, base: Path, sequences: Sequences, gradient_checkpointing: str, batch: int, budget_gib: float
    ) -> Measurement | None:
        params, processes = self.params, self.processes
        seq_length = params.compute.seq_length
        indices = np.arange(batch * processes.count * params.find_batch.steps) % len(sequences)
        with PeakMemory() as peak:
            kernels = choose_kernels(params.compute, params.quantization, params.lora, read_config(base))
            plan = BatchPlan(kernels, gradient_checkpointing, batch, batch * processes.count)
            learner: Learner | None = None
            with suppress(torch.OutOfMemoryError):
                learner = Learner(
                    self.model,
                    train=params.train,
                    compute=params.compute,
                    plan=plan,
                    num_steps=params.find_batch.steps,
                    processes=processes,
                )
            are_built = processes.gather(learner is not None)
            if learner is None or not all(are_built):
                return None
            buffer = learner.parameters.buffer
            failed = False
            start, first_timed = _now(), 0
            try:
                for step, step_indices in enumerate(indices.reshape(params.find_batch.steps, -1)):
                    if step == WARM_UP_STEPS:
                        start, first_timed = _now(), step
                    learner.step(sequences, step_indices, step)
                    if processes.count > 1 and learner.parameters.stop_requests.isnan():  # the loss can be NaN too
                        failed = True
                        break
                    if not peak.on_gpu and processes.count == 1 and peak.gib > budget_gib:
                        break  # the batch does not fit; on a GPU, the limit ends the probe
                step_s = (_now() - start) / (step + 1 - first_timed)
                if learner.is_asynchronous:  # train validates while the graph keeps its memory
                    learner.processes = Processes.alone(processes.device)
                    learner.validate(_windows(sequences, seq_length))
            except torch.OutOfMemoryError:
                failed = True
                if processes.count > 1:
                    buffer.fill_(torch.nan)
                    processes.sum_(buffer)
            else:
                if processes.count > 1 and not failed:  # joins the all-reduce of a process that failed after its steps
                    buffer.zero_()
                    processes.sum_(buffer)
                    failed = bool(buffer.isnan().any())
            uses_graph = learner.micro_batch.graph is not None
        del learner, buffer
        if failed:
            return None
        peak_gib = max(processes.gather(peak.reserved_gib if uses_graph else peak.gib))
        return Measurement(round(peak_gib, 3), batch * processes.count * seq_length / step_s)


def _windows(sequences: Sequences, seq_length: int) -> list[Window]:
    ((tokens,), _) = sequences.batch(np.array([0]))
    return windows([tokens] * VALIDATION_BATCH, bos=int(tokens[0]), seq_length=seq_length, stride=seq_length)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _reserved_bytes() -> int:
    """Frees unused memory. Returns the bytes that the GPU's allocator still reserves."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved())


class PeakMemory:
    """Peak GiB of the tensors that exist inside the block, on the GPU or the CPU.

    On a GPU: the memory that the allocator has allocated. On a CPU: the bytes of all tensors, counted when operations
    create them and when they are freed. The resident memory of the process would also count libraries and temporary
    memory of kernels, which differ between CPUs.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.counter = _TensorBytes()

    def __enter__(self) -> "PeakMemory":
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
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

    @property
    def reserved_gib(self) -> float:
        """Also counts the unused part of a CUDA graph's memory pool, because other operations cannot use it."""
        return float(torch.cuda.max_memory_reserved()) / 2**30


class _TensorBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations read and create, those of autograd too."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, (args, result))
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.device.type == "cpu" and storage not in self.counted:
            self.counted.add(storage)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._subtract, storage.nbytes())

    def _subtract(self, num_bytes: int) -> None:
        self.current -= num_bytes
