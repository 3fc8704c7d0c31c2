"""Collectives of the processes of a job."""

import os
import signal
import time

import pytest
import torch
from forked import run_forked

from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.launcher import PeerLost


def test_each_process_knows_its_place() -> None:
    def work(processes: Processes) -> tuple[int, int, bool, str]:
        return processes.index, processes.count, processes.is_main, processes.device.type

    assert run_forked(3, work) == [(0, 3, True, "cpu"), (1, 3, False, "cpu"), (2, 3, False, "cpu")]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_collectives(count: int) -> None:
    def work(processes: Processes) -> tuple[list[float], list[int], str]:
        tensor = torch.tensor([1.0, processes.index], dtype=torch.float64)
        alias = tensor.view(2)
        processes.sum_(tensor)
        return alias.tolist(), processes.gather(processes.index), processes.broadcast(f"from {processes.index}")

    indices = list(range(count))
    assert run_forked(count, work) == [([count, sum(indices)], indices, "from 0")] * count


def test_a_sum_of_zeros_keeps_each_bit() -> None:
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()

    def work(processes: Processes) -> bool:
        tensor = torch.zeros_like(values)
        tensor[processes.index :: 3] = values[processes.index :: 3]
        processes.sum_(tensor)
        return torch.equal(tensor, values)

    assert run_forked(3, work) == [True] * 3


def test_tensors_that_differ_in_one_bit_are_found() -> None:
    def work(processes: Processes) -> str:
        tensor = torch.ones(5)
        processes.require_equal(tensor, "the adapter")
        if processes.index == 1:
            tensor[3] = torch.nextafter(tensor[3], torch.tensor(2.0))
        with pytest.raises(RuntimeError, match="the adapter differs between the processes: ") as caught:
            processes.require_equal(tensor, "the adapter")
        return str(caught.value)

    first, second = run_forked(2, work)

    assert first == second


def test_one_process_needs_no_group() -> None:
    def work(processes: Processes) -> bool:
        processes.require_equal(torch.ones(1), "the adapter")
        processes.end()
        return torch.distributed.is_initialized()

    assert run_forked(1, work) == [False]


def test_a_job_of_one_process_waits_for_no_other_process() -> None:
    def work(processes: Processes) -> list[str]:
        alone = Processes.alone(processes.device)
        tensor = torch.ones(1)
        if processes.index == 1:
            alone.sum_(tensor)
        return [f"{alone.index} of {alone.count}", *alone.gather(str(tensor.item()))]

    assert run_forked(2, work) == [["0 of 1", "1.0"]] * 2


@pytest.mark.parametrize("collective", ["sum_", "gather", "broadcast"])
def test_a_peer_that_has_ended_is_reported(collective: str) -> None:
    """It is reported soon: no process waits for the timeout of a collective."""

    def work(processes: Processes) -> float:
        processes.gather(0)
        if processes.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerLost):
            getattr(processes, collective)(torch.ones(1))
        raise AssertionError(f"found after {time.monotonic() - started:.0f} s")

    with pytest.raises(AssertionError, match=r"found after [0-9] s|ended with exit code -9") as caught:
        run_forked(2, work)
    assert "PeerLost" not in str(caught.value)
