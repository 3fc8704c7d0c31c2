"""Which batch fits and which is fastest: a memory model, probes in a child process, the choice.

A probe is the training step itself, optimizer included, on sequences of full length. It runs in a process of its own,
which may die of lack of memory without harm, and which is replaced if a failed probe leaves memory behind: so that no
probe meets the fragments of another.
"""

import gc
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pdf2lora.errors import InputError

AS_FAST = 0.98  # of the best throughput: such settings count as equally fast, and the smallest is taken
LEFT_BEHIND = 64 * 2**20  # bytes that a failed probe may leave reserved


class Measurement(NamedTuple):
    """The peak of a probe's tensors, and its throughput."""

    peak_gib: float
    tokens_per_s: float


@dataclass(frozen=True)
class Probe:
    """A training step at one batch size; peak_gib is None where it did not come to its end."""

    batch: int
    fits: bool
    peak_gib: float | None


@dataclass(frozen=True)
class Mode:
    """The probes of one way of gradient checkpointing."""

    gradient_checkpointing: str
    probes: list[Probe]

    @property
    def largest(self) -> int:
        """The largest batch that fits; 0: none does."""
        return max((probe.batch for probe in self.probes if probe.fits), default=0)

    def peak_gib(self, batch: int) -> float | None:
        """Measured, or read off the memory model where this batch was not probed."""
        measured = {probe.batch: probe.peak_gib for probe in self.probes}
        line = memory_model(self.probes)
        return measured.get(batch) or (line and line[0] + line[1] * batch)


class Choice(NamedTuple):
    gradient_checkpointing: str
    per_device_batch: int
    gradient_accumulation_steps: int


Measure = Callable[[str, int], Measurement | None]


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


def search_modes(
    measure: Measure, modes: Sequence[str], *, smallest: int, largest: int, budget_gib: float
) -> list[Mode]:
    """Searches each mode, from the fastest step to the smallest, until `largest` fits.

    A mode that recomputes more is not faster at the same batch: it is of use only for batches that did not fit before.
    """
    searched: list[Mode] = []
    for mode in modes:

        def measure_peak(batch: int, mode: str = mode) -> float | None:
            measured = measure(mode, batch)
            return None if measured is None else measured.peak_gib

        searched.append(Mode(mode, search(measure_peak, smallest=smallest, largest=largest, budget_gib=budget_gib)))
        if searched[-1].largest == largest:
            break
    return searched


def choose(modes: Sequence[Mode], effective_batch: int | str, tokens_per_s: Callable[[str, int], float]) -> Choice:
    """The fastest of what fits: of each mode the largest batch that divides effective_batch (`auto`: the largest).

    tokens_per_s(mode, batch) is asked for only where there is more than one to choose from. Of those that are equally
    fast the one that takes the least memory.

    Raises:
        InputError: no probe of any mode fits.
    """
    candidates = [(mode, _largest_divisor(mode.largest, effective_batch)) for mode in modes if mode.largest]
    if not candidates:
        first = modes[-1].probes[0]
        peak = f"needs {first.peak_gib:.2f} GiB" if first.peak_gib else "runs out of memory"
        raise InputError(
            f"find_batch.min: {first.batch} sequences do not fit: a training step {peak}; lower find_batch.min or "
            "train.seq_length, set train.gradient_checkpointing to auto, or raise find_batch.cpu_memory_gib "
            "(on a GPU: raise find_batch.memory_gib or lower find_batch.gpu_headroom_gib)"
        )
    if len(candidates) > 1:
        speeds = [tokens_per_s(mode.gradient_checkpointing, batch) for mode, batch in candidates]
        fastest = max(speeds)
        fast = [candidate for candidate, speed in zip(candidates, speeds, strict=True) if speed >= AS_FAST * fastest]
        candidates = sorted(fast, key=lambda candidate: candidate[0].peak_gib(candidate[1]) or 0.0)
    mode, batch = candidates[0]
    accumulation = 1 if effective_batch == "auto" else int(effective_batch) // batch
    return Choice(mode.gradient_checkpointing, batch, accumulation)


def _largest_divisor(largest: int, effective_batch: int | str) -> int:
    if effective_batch == "auto":
        return largest
    assert isinstance(effective_batch, int)
    return next(batch for batch in range(min(largest, effective_batch), 0, -1) if effective_batch % batch == 0)


@dataclass(frozen=True)
class OutOfMemory:
    """A child's answer where memory ended; it takes no further question unless it freed all that the probe had."""

    takes_more: bool


class Child:
    """prepare(*arguments) in a child process, and functions of what it returns.

    On a CPU the child is forked from a server that has imported the libraries, so it starts at once; where there is a
    GPU it starts from nothing, since importing the libraries touches CUDA, which does not survive a fork.
    """

    def __init__(self, prepare: Callable[..., Any], *arguments: Any):
        self.task = (prepare, arguments)
        self.process: Any = None

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(prepared, *arguments), or None where the child ran out of memory or was killed for it.

        Raises:
            InputError: the child's own.
            RuntimeError: any other failure of the child, with its text.
        """
        if self.process is None:
            self._start()
        self.pipe.send((function, arguments))
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            exit_code, self.process = self.process.exitcode, None
            if exit_code != -signal.SIGKILL:  # what the kernel sends where memory ends
                raise RuntimeError(f"the training step of a probe ended with exit code {exit_code}") from None
            return None
        if isinstance(answer, OutOfMemory):
            if not answer.takes_more:
                self.end()
            return None
        if isinstance(answer, Exception):
            self.end()
            raise answer
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if not torch.cuda.is_available():
            context.set_forkserver_preload(["pdf2lora.training"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(theirs, *self.task), daemon=True)
        self.process.start()
        theirs.close()


def _answer(pipe: Connection, prepare: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child's life: ends with the pipe, with a failure, or with memory that does not come back."""
    prepared: Any = None
    reserved = 0
    while True:
        try:
            function, of = pipe.recv()
        except EOFError:
            return None
        try:
            if prepared is None:
                prepared = prepare(*arguments)
                reserved = _reserved_bytes()
            pipe.send(function(prepared, *of))
            continue
        except (torch.OutOfMemoryError, MemoryError):
            pass
        except InputError as error:
            return pipe.send(error)
        except Exception as error:
            if "DefaultCPUAllocator" not in str(error):  # torch has no exception of its own for it
                return pipe.send(RuntimeError(f"the training step of a probe failed: {type(error).__name__}: {error}"))
        # outside of `except`, whose traceback holds the failed step's tensors
        takes_more = torch.cuda.is_available() and prepared is not None and _reserved_bytes() - reserved < LEFT_BEHIND
        pipe.send(OutOfMemory(takes_more))
        if not takes_more:
            return None


def _reserved_bytes() -> int:
    """What the GPU's allocator holds once all that is free has been given back."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved())


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
