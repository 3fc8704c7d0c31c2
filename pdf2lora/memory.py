"""Which batch fits: a memory model, probes in child processes, the choice.

A probe is the training step itself, optimizer included, on sequences of full length, in a process of its own: a probe
that dies of lack of memory leaves no fragmented allocator behind for the next.
"""

import multiprocessing
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pdf2lora.errors import InputError

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Probe:
    """What a training step at one batch size took; peak_gib is None where it did not come to its end."""

    batch: int
    fits: bool
    peak_gib: float | None


def search(measure: Callable[[int], float | None], *, smallest: int, largest: int, budget_gib: float) -> list[Probe]:
    """Finds the largest batch of smallest..largest whose peak is within the budget; gives all probes, in order.

    measure(batch) gives the peak in GiB, or None where the step ran out of memory. Memory is nearly a line over the
    batch, so two probes predict where it meets the budget, and the bounds close in around that point; a prediction
    outside the bounds makes way for their nearest end, and the longer the search, the nearer to the middle. The answer
    is exact: it fits, and the next batch does not.
    """
    probes: list[Probe] = []

    def probe(batch: int) -> bool:
        peak = measure(batch)
        probes.append(Probe(batch, peak is not None and peak <= budget_gib, peak))
        return probes[-1].fits

    if not probe(smallest):
        return probes
    fits, too_large = smallest, largest + 1
    while too_large - fits > 1:
        line = memory_model(probes)
        predicted = int((budget_gib - line[0]) / line[1]) if line and line[1] > 0 else 2 * fits
        margin = min(2 ** max(0, len(probes) - 4), (too_large - fits) // 2)
        batch = min(max(predicted, fits + margin), too_large - margin)
        if probe(batch):
            fits = batch
        else:
            too_large = batch
    return probes


def memory_model(probes: list[Probe]) -> tuple[float, float] | None:
    """(GiB at batch 0, GiB a sequence): the line through the two largest batches that came to their end."""
    ended = sorted((p.batch, p.peak_gib) for p in probes if p.peak_gib is not None)
    if len(ended) < 2:
        return None
    (few, low), (many, high) = ended[-2:]
    per_sequence = (high - low) / (many - few)
    return low - per_sequence * few, per_sequence


def choose(probes: list[Probe], effective_batch: int | str) -> tuple[int, int]:
    """(per_device_batch, gradient_accumulation_steps), their product effective_batch; `auto`: the largest that fits.

    Raises:
        InputError: no probe fits.
    """
    largest = max((probe.batch for probe in probes if probe.fits), default=0)
    if not largest:
        peak = f"needs {probes[0].peak_gib:.2f} GiB" if probes[0].peak_gib else "runs out of memory"
        raise InputError(
            f"find_batch.min: {probes[0].batch} sequences do not fit: a training step {peak}; lower find_batch.min or "
            "train.seq_length, turn train.gradient_checkpointing on, or raise find_batch.cpu_memory_gib "
            "(on a GPU: lower find_batch.gpu_headroom_gib)"
        )
    if effective_batch == "auto":
        return largest, 1
    assert isinstance(effective_batch, int)
    per_device = next(batch for batch in range(min(largest, effective_batch), 0, -1) if effective_batch % batch == 0)
    return per_device, effective_batch // per_device


def measure_in_child(step: Callable[..., float], *arguments: Any) -> float | None:
    """step(*arguments) in a child process: its result, or None where the child ran out of memory or was killed for it.

    On a CPU the child is forked from a server that has imported the libraries, so it starts at once; where there is a
    GPU it starts from nothing, since importing the libraries touches CUDA, which does not survive a fork.

    Raises:
        InputError: the child's own.
        RuntimeError: any other failure of the step, with its text.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["pdf2lora.training"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(theirs, step, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        child.join()
        if child.exitcode != -signal.SIGKILL:  # what the kernel sends where memory ends
            raise RuntimeError(f"the training step of a probe ended with exit code {child.exitcode}") from None
        result = OUT_OF_MEMORY
    child.join()
    if isinstance(result, float):
        return result
    if result == OUT_OF_MEMORY:
        return None
    raise result


def _send_result(pipe: Connection, step: Callable[..., float], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(float(step(*arguments)))
    except (torch.OutOfMemoryError, MemoryError):
        pipe.send(OUT_OF_MEMORY)
    except InputError as error:
        pipe.send(error)
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):  # torch has no exception of its own for it
            return pipe.send(OUT_OF_MEMORY)
        pipe.send(RuntimeError(f"the training step of a probe failed: {type(error).__name__}: {error}"))


class PeakMemory:
    """Peak GiB of the tensors that exist inside the block, on the GPU or the CPU.

    On a GPU: what the allocator reserved. On a CPU: the bytes of all tensors, counted as operations make them and as
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
        return float(torch.cuda.max_memory_reserved() if self.on_gpu else self.counter.peak) / 2**30


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
