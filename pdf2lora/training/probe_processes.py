"""The processes in which find_batch measures. There are as many as in train, each with one GPU.

If a process dies because memory runs out, the search continues. If a failed probe did not free its memory, all
processes are replaced, so that the next probe starts with unfragmented memory.
"""

import multiprocessing
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from pdf2lora.errors import InputError
from pdf2lora.params import Params, Placement
from pdf2lora.paths import BASE, TOKENS
from pdf2lora.runtime.launcher import PIPE, job_environments
from pdf2lora.runtime.parallel import end_with_parent
from pdf2lora.token_files import TokenFile
from pdf2lora.training.batch_search import Measurement

ANSWER_S = 7200.0  # longest time for one answer; the first one can include the quantization of a large base
GRACE_S = 5.0  # time that the other processes have to answer after the first failure
NUM_TRIES = 2  # a process may have been killed for another reason than memory


@dataclass(frozen=True)
class Capabilities:
    """The kernels, settings and memory that train can use here.

    reference_reason: why the reference kernels run although there is a GPU; empty in all other cases.
    free_gib: of the GPU with the least free memory, before the model is loaded.
    placements: of the decoder layers; resident_gib: GPU memory of the whole model.
    """

    device: str
    kernels: str
    gradient_checkpointing: tuple[str, ...]
    free_gib: float
    placements: tuple[Placement, ...]
    resident_gib: float
    reference_reason: str = ""


class MeasureRequest(NamedTuple):
    gradient_checkpointing: str
    batch: int
    budget_gib: float
    placement: Placement


@dataclass(frozen=True)
class OutOfMemory:
    """The answer of a process that ran out of memory. is_clean: it has freed all memory of the probe."""

    is_clean: bool


class Killed(Exception):
    """A process was ended by SIGKILL. Usually the kernel sends it because memory ran out."""


Answer = Capabilities | Measurement | OutOfMemory | Exception


class ProbeProcesses:
    """Sends each request to all processes and combines their answers."""

    def __init__(self, params: Params, count: int):
        self.params, self.count = params, count
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self._start()

    def __enter__(self) -> "ProbeProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def capabilities(self) -> Capabilities:
        """Raises InputError if the settings need something that this machine cannot run, or memory ran out."""
        answer = self._ask_with_retry(None)
        if answer is None:
            raise InputError(
                "find_batch: memory ran out before the base model was loaded, while torch and transformers were "
                "imported. Free some (free -h shows it) and run dvc repro again."
            )
        assert isinstance(answer, Capabilities)
        return answer

    def measure(
        self, gradient_checkpointing: str, batch: int, budget_gib: float, placement: Placement
    ) -> Measurement | None:
        """The measurement of a probe; None if a process ran out of memory."""
        answer = self._ask_with_retry(MeasureRequest(gradient_checkpointing, batch, budget_gib, placement))
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
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                pipe.send(request)
        answers = self._receive()
        if any(isinstance(answer, Killed) for answer in answers):
            self.end()
            raise Killed
        if any(isinstance(answer, OutOfMemory) for answer in answers):  # it can have caused the other failures
            are_clean = [isinstance(answer, OutOfMemory) and answer.is_clean for answer in answers]
            if len(answers) < self.count or not all(are_clean):
                self.end()
            return None
        if errors := [answer for answer in answers if isinstance(answer, Exception)]:
            self.end()
            raise min(errors, key=lambda error: "PeerLost" in str(error))  # the cause before its consequences
        first = answers[0]
        assert isinstance(first, (Capabilities, Measurement))
        return first

    def _receive(self) -> list[Answer]:
        """The answers of the processes. After a first failure it waits only GRACE_S, because the others may hang."""
        answers: dict[int, Answer] = {}
        timeout_s = ANSWER_S
        while waiting := [index for index in range(self.count) if index not in answers]:
            ready = wait([self.pipes[index] for index in waiting], timeout_s)
            if not ready and timeout_s == GRACE_S:
                break
            if not ready:
                self.end()
                raise InputError(
                    f"find_batch: process {waiting[0]} of {self.count} has not answered for {ANSWER_S:.0f} s. Look at "
                    "the machine (top) and its GPU (nvidia-smi), then run dvc repro again."
                )
            for index in [index for index in waiting if self.pipes[index] in ready]:
                try:
                    answers[index] = self.pipes[index].recv()
                except (EOFError, ConnectionError):
                    answers[index] = self._death(index)
                if not isinstance(answers[index], (Capabilities, Measurement)):
                    timeout_s = GRACE_S
        return list(answers.values())

    def _death(self, index: int) -> Exception:
        """The exception for a process that ended without an answer."""
        process = self.processes[index]
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return Killed()
        return RuntimeError(f"find_batch: a probe ended its process with exit code {process.exitcode}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for environment in job_environments(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.params, environment), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)


def _serve(pipe: Connection, params: Params, environment: dict[str, str]) -> None:
    """The main loop of a probe process: it answers requests until the pipe closes or an error occurs."""
    end_with_parent()  # a probe that goes on would use a GPU whose lock is free again
    os.environ |= environment
    os.environ.pop(PIPE, None)
    try:
        from pdf2lora.training.probe import Prober  # imports torch, before the first request

        prober = Prober(params)
        while True:
            if (request := pipe.recv()) is None:
                pipe.send(prober.capabilities())
            else:
                sequences = TokenFile.open(TOKENS, "train").sequences(params.compute.seq_length)
                pipe.send(prober.measure(BASE, sequences, *request))
    except EOFError:
        return
    except (InputError, ModuleNotFoundError) as error:
        pipe.send(error)
    except Exception as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # torch has no class for it
            pipe.send(OutOfMemory(is_clean=False))
        else:
            pipe.send(RuntimeError(f"find_batch: a probe failed: {type(error).__name__}: {error}"))
