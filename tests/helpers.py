"""Helpers for tests of jobs with several processes."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from pdf2lora.documents.records import Document, write_through
from pdf2lora.runtime.distributed import Processes

Result = TypeVar("Result")


def write_documents(file: Path, documents: Iterable[Document]) -> None:
    for _ in write_through(file, documents):
        pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_forked(count: int, function: Callable[[Processes], Result], *, timeout_s: float = 60) -> list[Result]:
    """Calls function(processes) in `count` new processes of one job; returns the picklable results in their order.

    The processes are forks of pytest's process, so they need not import torch. They communicate over gloo.

    Raises:
        AssertionError: a process raised an error, ended or did not finish within timeout_s.
    """
    if torch.cuda.is_available():
        pytest.skip("a process that uses CUDA cannot be forked; tests with the marker gpu use the launcher")
    context = multiprocessing.get_context("fork")
    port = free_port()
    children, pipes = [], []
    for index in range(count):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_call, args=(theirs, index, count, port, function), daemon=True)
        child.start()
        theirs.close()
        children.append(child)
        pipes.append(ours)
    answers: dict[int, tuple[Any, str]] = {}
    try:
        while len(answers) < count:
            ready = wait([pipe for index, pipe in enumerate(pipes) if index not in answers], timeout_s)
            assert ready, f"processes {set(range(count)) - answers.keys()} did not finish within {timeout_s} s"
            for index in [index for index, pipe in enumerate(pipes) if pipe in ready]:
                try:
                    answers[index] = pipes[index].recv()
                except EOFError:
                    children[index].join()
                    answers[index] = (None, f"ended with exit code {children[index].exitcode}")
                assert not answers[index][1], f"process {index} of {count}: {answers[index][1]}"
    finally:
        for child in children:
            child.kill()
            child.join()
    return [answers[index][0] for index in range(count)]


def _call(pipe: Connection, index: int, count: int, port: int, function: Callable[[Processes], Any]) -> None:
    """The main function of a forked process."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if count > 1:
        os.environ |= {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)  # the threads of the parent do not exist here
    try:
        answer = (function(Processes()), "")
    except BaseException:
        answer = (None, traceback.format_exc())
    pipe.send(answer)
    time.sleep(600)  # run_forked kills it: if it ended now, the connections of a slower process could fail
