"""Which batch fits and which is fastest: a memory model, probes in a child process, the choice.

A probe is the training step itself, optimizer included, on sequences of full length: probe.py. It runs in a process of
its own, which may die of lack of memory without harm, and which is replaced if a failed probe leaves memory behind: so
that no probe meets the fragments of another.

torch, transformers and peft take seconds to import, on a machine with a GPU twenty: the child alone does so, while the
parent reads and counts tokens.
"""

import ctypes
import gc
import importlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pdf2lora.errors import InputError

AS_FAST = 0.98  # of the best throughput: such settings count as equally fast, and the smallest is taken
LEFT_BEHIND = 64 * 2**20  # bytes that a failed probe may leave reserved beyond what one that ended well left


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


class Killed(Exception):
    """The child was ended by SIGKILL, which is what the kernel sends where memory ends, and not only then."""


class Child:
    """The functions of a module, called in a child process that imports it at once, while the parent goes on.

    On a CPU the child is forked from a server that has imported the module, so that its successors start at once; where
    there may be a GPU each starts from nothing, since importing the libraries touches CUDA, which does not survive a
    fork.
    """

    def __init__(self, module: str):
        self.module = module
        self.preparation: tuple[Any, ...] | None = None
        self.is_prepared = False
        self.process: Any = None
        self.context: Any = multiprocessing.get_context("spawn" if has_cuda_driver() else "forkserver")
        if has_cuda_driver():
            self._start()
        else:
            self.context.set_forkserver_preload(["pdf2lora.quiet", module])
            forkserver.ensure_running()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def prepare(self, *arguments: Any) -> None:
        """From now on ask() calls function(prepared, ...), prepared = prepare(*arguments) of the module.

        Each process prepares once, when the next question is asked.
        """
        self.preparation, self.is_prepared = arguments, False

    def ask(self, function: str, *arguments: Any) -> Any:
        """function([prepared,] *arguments) of the module, or None where the child ran out of memory.

        A child that was killed may have been killed for something else: the question goes to another one, and only if
        that is killed as well, memory has ended.

        Raises:
            InputError, ModuleNotFoundError: the child's own.
            RuntimeError: any other failure of the child, with its text.
        """
        for _ in range(2):
            with suppress(Killed):
                return self._answer_of(function, arguments)
        return None

    def _answer_of(self, function: str, arguments: tuple[Any, ...]) -> Any:
        if self.process is None:
            self._start()
        try:
            self.pipe.send((None if self.is_prepared else self.preparation, function, arguments))
            self.is_prepared = self.preparation is not None
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):  # it died: now, or since it answered last
            self.process.join()
            exit_code = self.process.exitcode
            self.end()
            if exit_code == -signal.SIGKILL:
                raise Killed from None
            raise RuntimeError(f"{self.module}.{function} ended its process with exit code {exit_code}") from None
        if isinstance(answer, OutOfMemory):
            if not answer.takes_more:
                self.end()
            return None
        if isinstance(answer, Exception):
            self.end()
            raise answer
        return answer

    def end(self) -> None:
        """At once, even if it still imports; a later question starts another one."""
        if self.process is not None:
            self.pipe.close()
            self.process.terminate()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_answer, args=(theirs, self.module), daemon=True)
        self.process.start()
        self.is_prepared = False
        theirs.close()


def has_cuda_driver() -> bool:
    """Whether there may be a GPU; torch would know, and takes seconds to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _answer(pipe: Connection, module_name: str) -> None:
    """The child's life: ends with the pipe, with a failure, or with memory that does not come back."""
    import torch

    with suppress(Exception):  # which comes again, and is answered, when the first question needs the module
        importlib.import_module(module_name)
    prepared: tuple[Any, ...] = ()
    reserved = 0
    while True:
        try:
            preparation, function, arguments = pipe.recv()
        except EOFError:
            return None
        try:
            module: Any = importlib.import_module(module_name)
            if preparation is not None:
                prepared = ()
                prepared = (module.prepare(*preparation),)
            answer = getattr(module, function)(*prepared, *arguments)
            reserved = _reserved_bytes()  # with the workspaces that cuBLAS takes in its first product and keeps
            pipe.send(answer)
            continue
        except (torch.OutOfMemoryError, MemoryError):
            pass
        except (InputError, ModuleNotFoundError) as error:
            return pipe.send(error)
        except Exception as error:
            if "DefaultCPUAllocator" not in str(error):  # torch has no exception of its own for it
                return pipe.send(RuntimeError(f"{module_name}.{function} failed: {type(error).__name__}: {error}"))
        # outside of `except`, whose traceback holds the failed step's tensors
        takes_more = torch.cuda.is_available() and prepared != () and _reserved_bytes() - reserved < LEFT_BEHIND
        pipe.send(OutOfMemory(takes_more))
        if not takes_more:
            return None


def _reserved_bytes() -> int:
    """What the GPU's allocator holds once all that is free has been given back."""
    import torch

    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved())
