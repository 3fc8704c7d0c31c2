"""Which batch fits and which is fastest: a memory model, probes in a child process, the choice.

A probe is the training step itself, optimizer included, on sequences of full length: probe.py. It runs in a process of
its own, which may die of lack of memory without harm, and which is replaced if a failed probe leaves memory behind: so
that no probe meets the fragments of another.

torch, transformers and peft take seconds to import, on a machine with a GPU twenty: the child alone does so, while the
parent reads and counts tokens.
"""

import gc
import importlib
import multiprocessing
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.runtime.gpus import has_cuda_driver

LEFT_BEHIND = 64 * 2**20  # bytes that a failed probe may leave reserved beyond what one that ended well left


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
            self.context.set_forkserver_preload([module])
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
