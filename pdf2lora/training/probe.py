"""A probe: a few optimizer steps of one micro-batch size, with their peak memory and their time.

It runs the step that train runs, in as many processes. A probe that runs out of memory in one process must not leave
the others waiting in a collective: that process still joins one all-reduce, with a buffer of NaN, and all see it.
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

WARM_UP_STEPS = 1  # compile kernels and fill the allocator
MAX_LEFT_BYTES = 64 * 2**20  # more reserved memory than this after a failed probe needs a new process


class Prober:
    """Measures probes of one model in one process of the job."""

    def __init__(self, params: Params):
        logging.disable()
        warnings.simplefilter("ignore")  # train logs these once; a probe need not
        self.params = params
        self.processes = Processes()
        self.model: Any = None
        self.placement: Placement | None = None  # of self.model
        self.reserved_bytes = 0  # after the last probe that ended well, with the workspaces that cuBLAS keeps

    def capabilities(self) -> Capabilities:
        """Raises:
        InputError: the settings ask for something that this machine cannot run.
        """
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
        """Peak of the fullest process, and throughput of all, of find_batch.steps optimizer steps."""
        limit_gpu_memory(budget_gib)
        if placement != self.placement:
            self.model, self.placement = None, placement
            _reserved_bytes()  # gives back the memory of the earlier model
        with suppress(torch.OutOfMemoryError):
            if self.model is None:
                self.model = build_model(base, self.params, self.processes, placement)
        measurement = None
        if all(self.processes.gather(self.model is not None)):
            measurement = self._measure(base, sequences, gradient_checkpointing, batch)
        if measurement is not None:
            self.reserved_bytes = _reserved_bytes()
            return measurement
        is_clean = torch.cuda.is_available() and _reserved_bytes() - self.reserved_bytes < MAX_LEFT_BYTES
        return OutOfMemory(all(self.processes.gather(is_clean)))

    def _measure(self, base: Path, sequences: Sequences, gradient_checkpointing: str, batch: int) -> Measurement | None:
        params, processes = self.params, self.processes
        seq_length = params.compute.seq_length
        rows = np.arange(batch * processes.count * params.find_batch.steps) % len(sequences)
        ends = []
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
            try:
                for step, step_rows in enumerate(rows.reshape(params.find_batch.steps, -1)):
                    learner.step(sequences, step_rows, step)
                    if processes.count > 1 and learner.parameters.loss.isnan():
                        failed = True
                        break
                    ends.append(_now())
                if not learner.micro_batch.graph_obstacle:  # a graph keeps its memory while train validates
                    learner.processes = Processes.alone(processes.device)
                    learner.validate(_windows(sequences, seq_length))
            except torch.OutOfMemoryError:
                failed = True
                if processes.count > 1:
                    buffer.fill_(torch.nan)
                    processes.sum_(buffer)
            else:
                if processes.count > 1 and not failed:  # a process that failed after its last reduction joins here
                    buffer.zero_()
                    processes.sum_(buffer)
                    failed = bool(buffer.isnan().any())
            uses_graph = learner.micro_batch.graph is not None
        del learner, buffer
        if failed:
            return None
        peak_gib = max(processes.gather(peak.reserved_gib if uses_graph else peak.gib))
        step_s = (ends[-1] - ends[WARM_UP_STEPS - 1]) / (len(ends) - WARM_UP_STEPS)
        return Measurement(round(peak_gib, 3), batch * processes.count * seq_length / step_s)


def _windows(sequences: Sequences, seq_length: int) -> list[Window]:
    ((tokens,), _) = sequences.batch(np.array([0]))
    return windows([tokens] * VALIDATION_BATCH, bos=int(tokens[0]), seq_length=seq_length, stride=seq_length)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _reserved_bytes() -> int:
    """What the GPU's allocator holds after all that is free has been given back."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved())


class PeakMemory:
    """Peak GiB of the tensors that exist inside the block, on the GPU or the CPU.

    On a GPU: what the allocator handed out. On a CPU: the bytes of all tensors, counted as operations create them and
    as they are freed. The resident size of the process would also hold libraries and scratch space of kernels, which
    differ from one CPU to the next.
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
        """With the unused part of the pool of a CUDA graph, which nothing else can use."""
        return float(torch.cuda.max_memory_reserved()) / 2**30


class _TensorBytes(TorchDispatchMode):
    """Sees every operation, also those of autograd, and follows the storages of their results."""

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
