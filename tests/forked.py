"""Processes of one job, as forks of pytest's process: they need not import torch."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState

from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.launcher import job_environments

Result = TypeVar("Result")


def run_forked(count: int, function: Callable[[Processes], Result], *, timeout_s: float = 60) -> list[Result]:
    """Calls function(processes) in `count` new processes of one job; returns the picklable results in their order.

    The processes communicate over gloo.

    Raises:
        AssertionError: a process raised an error, ended or did not finish within timeout_s.
    """
    context = multiprocessing.get_context("fork")
    children, pipes = [], []
    for environment in job_environments(count):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_call, args=(theirs, environment, function), daemon=True)
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


def _call(pipe: Connection, environment: dict[str, str], function: Callable[[Processes], Any]) -> None:
    """The main function of a forked process."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ |= environment
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)  # the threads of the parent do not exist here
    try:
        answer = (function(Processes()), "")
    except BaseException:
        answer = (None, traceback.format_exc())
    pipe.send(answer)
    time.sleep(600)  # run_forked kills it: if it ended now, the connections of a slower process could fail
