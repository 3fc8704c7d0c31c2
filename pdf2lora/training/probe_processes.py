"""The processes in which find_batch measures: as many as train uses, each with one GPU.

A process can die of lack of memory without harm to the search. All are replaced together after a failed probe that left
memory behind, so no probe meets the fragments of another. They import torch while the parent reads and tokenizes.
"""

import multiprocessing
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.params import Params
from pdf2lora.runtime.launcher import PIPE, job_environment
from pdf2lora.tokens import Sequences
from pdf2lora.training.batch_search import Measurement

ANSWER_S = 600.0  # the longest time for one answer, the import of torch included
NUM_TRIES = 2  # a killed process may have been killed for another reason than memory


@dataclass(frozen=True)
class Capabilities:
    """What train can run here; free_gib: of the GPU with the least free memory, before the model is loaded."""

    device: str
    kernels: str
    gradient_checkpointing: tuple[str, ...]
    free_gib: float


@dataclass(frozen=True)
class Setup:
    """What all probes share."""

    base: Path
    sequences: Sequences


@dataclass(frozen=True)
class MeasureRequest:
    gradient_checkpointing: str
    batch: int
    budget_gib: float


@dataclass(frozen=True)
class OutOfMemory:
    """The answer where memory ended; is_clean: the processes hold no more than before the probe."""

    is_clean: bool


class Killed(Exception):
    """A process was ended by SIGKILL: the kernel sends it where memory ends, but not only then."""


class ProbeProcesses:
    """Asks all processes the same and combines their answers."""

    def __init__(self, params: Params, count: int):
        self.params, self.count = params, count
        self.setup: Setup | None = None
        self.is_set_up = False
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self._start()

    def __enter__(self) -> "ProbeProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def capabilities(self) -> Capabilities:
        """Raises:
        InputError: the settings ask for something that this machine cannot run, or memory ended.
        """
        answer = self._ask_with_retry(None)
        if answer is None:
            raise InputError(
                "find_batch: memory ended before the base model was loaded, while torch and transformers were "
                "imported. Free some (free -h shows it) and run dvc repro again."
            )
        assert isinstance(answer, Capabilities)
        return answer

    def prepare(self, base: Path, sequences: Sequences) -> None:
        """Says what later probes train; they load the model when the first one runs."""
        self.setup, self.is_set_up = Setup(base, sequences), False

    def measure(self, gradient_checkpointing: str, batch: int, budget_gib: float) -> Measurement | None:
        """A probe's result; None where a process ran out of memory."""
        answer = self._ask_with_retry(MeasureRequest(gradient_checkpointing, batch, budget_gib))
        assert answer is None or isinstance(answer, Measurement)
        return answer

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _ask_with_retry(self, request: MeasureRequest | None) -> Capabilities | Measurement | None:
        for _ in range(NUM_TRIES):
            with suppress(Killed):
                return self._ask(request)
        return None

    def _ask(self, request: MeasureRequest | None) -> Capabilities | Measurement | None:
        if not self.processes:
            self._start()
        messages: list[Setup | MeasureRequest | None] = [request]
        if self.setup and not self.is_set_up and request is not None:
            messages.insert(0, self.setup)
            self.is_set_up = True
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                for message in messages:
                    pipe.send(message)
        answers = [self._receive(index) for index in range(self.count)]
        if any(isinstance(answer, OutOfMemory) for answer in answers):  # the others may have failed because of it
            if not all(isinstance(answer, OutOfMemory) and answer.is_clean for answer in answers):
                self.end()
            return None
        for answer in answers:
            if isinstance(answer, Exception):
                self.end()
                raise answer
        first = answers[0]
        assert isinstance(first, (Capabilities, Measurement))
        return first

    def _receive(self, index: int) -> Capabilities | Measurement | OutOfMemory | Exception:
        """The answer of one process; finds the death of any of them."""
        sentinels = {process.sentinel: process for process in self.processes}
        ready = wait([self.pipes[index], *sentinels], ANSWER_S)
        if self.pipes[index] in ready:
            with suppress(EOFError, ConnectionError):
                answer: Capabilities | Measurement | OutOfMemory | Exception = self.pipes[index].recv()
                return answer
        dead = [process for process in self.processes if process.sentinel in wait(list(sentinels), 1)]
        self.end()
        if not dead:
            raise InputError(
                f"find_batch: process {index} of {self.count} has not answered for {ANSWER_S:.0f} s. Look at its GPU "
                "(nvidia-smi), then run dvc repro again."
            )
        if any(process.exitcode == -signal.SIGKILL for process in dead):
            raise Killed
        raise RuntimeError(f"find_batch: a probe ended its process with exit code {dead[0].exitcode}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        environment = job_environment(self.count) if self.count > 1 else {}
        self.is_set_up = False
        for index in range(self.count):
            ours, theirs = context.Pipe()
            own = environment | ({"RANK": str(index), "LOCAL_RANK": str(index)} if environment else {})
            process = context.Process(target=_serve, args=(theirs, self.params, own), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)


def _serve(pipe: Connection, params: Params, environment: dict[str, str]) -> None:
    """The life of a probe process: answers until the pipe closes, or until an error."""
    os.environ |= environment
    os.environ.pop(PIPE, None)
    setup: Setup | None = None
    prober: Any = None
    while True:
        try:
            if prober is None:  # the import starts at once, before the first request
                from pdf2lora.training.probe import Prober

                prober = Prober(params)
            request = pipe.recv()
            if isinstance(request, Setup):
                setup = request
            elif request is None:
                pipe.send(prober.capabilities())
            else:
                assert setup is not None
                pipe.send(
                    prober.measure(
                        setup.base,
                        setup.sequences,
                        request.gradient_checkpointing,
                        request.batch,
                        request.budget_gib,
                    )
                )
        except EOFError:
            return None
        except (InputError, ModuleNotFoundError) as error:
            return pipe.send(error)
        except MemoryError:
            return pipe.send(OutOfMemory(is_clean=False))
        except Exception as error:
            if "DefaultCPUAllocator" in str(error):  # torch has no exception of its own for it
                return pipe.send(OutOfMemory(is_clean=False))
            return pipe.send(RuntimeError(f"find_batch: a probe failed: {type(error).__name__}: {error}"))
