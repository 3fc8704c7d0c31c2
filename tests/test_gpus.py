"""Which GPUs a process may use, and the locks on them; with NVML replaced."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import REPOSITORY

from pdf2lora.errors import InputError
from pdf2lora.runtime import gpus
from pdf2lora.runtime.gpus import reserve_gpus, visible_gpus
from pdf2lora.runtime.launcher import allot_devices
from pdf2lora.runtime.locks import try_lock

UUIDS = ["GPU-aaaa0000-1111", "GPU-bbbb0000-2222", "GPU-bbbb9999-3333"]


class FakeNvml:
    """NVML with these GPUs; the one with an empty name cannot be opened."""

    def __init__(self, uuids: list[str], status: int = 0):
        self.uuids, self.status, self.is_open = uuids, status, False

    def nvmlInit_v2(self) -> int:
        self.is_open = self.status == 0
        return self.status

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.uuids)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0 if self.uuids[index] else 15

    def nvmlDeviceGetUUID(self, handle: Any, name: Any, size: int) -> int:
        assert size == len(name)
        name.value = self.uuids[handle.value - 1].encode()
        return 0


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FakeNvml]:
    """Replaces NVML and the folder of the locks; CUDA_VISIBLE_DEVICES is not set."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")

    def replace(uuids: list[str], status: int = 0) -> FakeNvml:
        library = FakeNvml(uuids, status)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        return library

    return replace


# visible_gpus


def test_all_gpus_are_visible_in_the_order_of_nvml(nvml: Any) -> None:
    library = nvml(UUIDS)

    assert visible_gpus() == UUIDS

    assert not library.is_open


def test_a_gpu_that_cannot_be_opened_is_left_out(nvml: Any) -> None:
    nvml([UUIDS[0], "", UUIDS[2]])

    assert visible_gpus() == [UUIDS[0], UUIDS[2]]


def test_without_a_driver_there_is_no_gpu(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml([], status=9)
    assert visible_gpus() == []

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("allowed", "indices"),
    [
        ("0", [0]),
        ("2,0", [2, 0]),
        ("1,0,1", [1, 0]),
        (" 1 , 2 ", [1, 2]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),  # CUDA ignores what follows an invalid index
        ("1,7,0", [1]),
        (UUIDS[1], [1]),
        (f"{UUIDS[2]},{UUIDS[0]}", [2, 0]),
        ("GPU-aa", [0]),
        ("GPU-bbbb9", [2]),
    ],
)
def test_cuda_visible_devices_selects(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, allowed: str, indices: list[int]
) -> None:
    nvml(UUIDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)

    assert visible_gpus() == [UUIDS[index] for index in indices]


def test_a_slice_of_a_gpu_keeps_its_name(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML lists whole GPUs only."""
    nvml(UUIDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")

    assert visible_gpus() == ["MIG-1234"]


# reserve_gpus

HOLD = """
import sys
from pathlib import Path
from pdf2lora.runtime import gpus

gpus.LOCKS = Path(sys.argv[1])
with gpus.reserve_gpus(sys.argv[3:], int(sys.argv[2])) as (reserved, locks):
    print(*reserved, flush=True)
    sys.stdin.readline()
"""
HOLD_WITH_A_WORKER = """
import subprocess, sys
from pathlib import Path
from pdf2lora.runtime import gpus

gpus.LOCKS = Path(sys.argv[1])
with gpus.reserve_gpus(sys.argv[3:], int(sys.argv[2])) as (reserved, locks):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    print(subprocess.Popen(sleep, pass_fds=locks).pid, subprocess.Popen(sleep).pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold(nvml: Any) -> Iterator[Callable[..., Any]]:
    """Starts a process that holds locks until it ends or reads a line. Returns it and the words that it printed."""
    processes = []

    def hold(count: int, code: str = HOLD) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(gpus.LOCKS), str(count), *UUIDS],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().split()

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def is_free(*names: str) -> bool:
    """Whether all these GPUs can be locked now."""
    for name in names:
        with (gpus.LOCKS / f"{name}.lock").open("a+") as lock:
            if not try_lock(lock):
                return False
    return True


def test_the_first_free_gpus_are_reserved(hold: Any) -> None:
    _, held = hold(1)
    assert held == UUIDS[:1]

    with reserve_gpus(UUIDS, 2) as (reserved, locks):
        assert reserved == UUIDS[1:]
        assert len(set(locks)) == 2
        assert not is_free(UUIDS[1])

    assert is_free(*UUIDS[1:])
    assert not is_free(UUIDS[0])


def test_one_reservation_leaves_the_other_gpus_free(nvml: Any) -> None:
    with reserve_gpus(UUIDS, 1):
        assert is_free(*UUIDS[1:])
        assert not is_free(UUIDS[0])


@pytest.mark.parametrize("end", ["well", signal.SIGKILL, signal.SIGTERM])
def test_a_reservation_waits_until_enough_gpus_are_free(
    hold: Any, capsys: pytest.CaptureFixture[str], end: Any
) -> None:
    process, _ = hold(2)
    started = time.monotonic()

    def end_soon() -> None:
        time.sleep(0.7)
        if end == "well":
            process.stdin.write("\n")
            process.stdin.flush()
        else:
            process.send_signal(end)

    threading.Thread(target=end_soon).start()
    with reserve_gpus(UUIDS, 2) as (reserved, _):
        assert time.monotonic() - started > 0.6
        assert reserved == UUIDS[:2]

    (line,) = capsys.readouterr().out.splitlines()
    assert "free GPUs (2 needed)" in line


def test_two_runs_that_need_two_of_three_gpus_do_not_block_each_other(hold: Any) -> None:
    """If a reservation gets only one of two GPUs, it releases it before it waits."""
    process, _ = hold(2)

    with reserve_gpus(UUIDS[2:], 1):
        pass
    process.kill()
    process.wait()
    with reserve_gpus(UUIDS, 3) as (reserved, _):
        assert reserved == UUIDS


def test_a_process_that_inherits_the_descriptors_keeps_the_lock(hold: Any) -> None:
    """It keeps the lock until its end, even after kill -9 of the launcher."""
    launcher, pids = hold(1, HOLD_WITH_A_WORKER)
    worker, other = (psutil.Process(int(pid)) for pid in pids)
    try:
        launcher.kill()
        launcher.wait()
        assert not is_free(UUIDS[0])

        worker.kill()

        until = time.monotonic() + 5
        while not is_free(UUIDS[0]) and time.monotonic() < until:
            time.sleep(0.02)
        assert is_free(UUIDS[0])
        assert other.is_running()  # it has no lock
    finally:
        for process in (worker, other):
            with suppress(psutil.NoSuchProcess):
                process.kill()


# allot_devices


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores the environment variables that allot_devices sets."""
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("num_processes", "count"), [("auto", 3), (1, 1), (2, 2), (3, 3)])
def test_each_process_gets_a_gpu(nvml: Any, num_processes: Any, count: int) -> None:
    nvml(UUIDS)

    with allot_devices(num_processes) as (allotted, locks):
        assert (allotted, len(locks)) == (count, count)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(UUIDS[:count])
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert not is_free(UUIDS[0])


@pytest.mark.usefixtures("environment")
def test_two_experiments_get_different_gpus(nvml: Any, hold: Any) -> None:
    nvml(UUIDS)
    hold(1)

    with allot_devices(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == UUIDS[1]


@pytest.mark.usefixtures("environment")
def test_more_processes_than_gpus_are_refused(nvml: Any) -> None:
    nvml(UUIDS[:2])

    with pytest.raises(InputError) as caught, allot_devices(3):
        pass

    for words in ("compute.num_processes", "3", "2 visible GPUs", "auto"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("num_processes", "count"), [("auto", 1), (1, 1), (4, 4)])
def test_without_a_gpu_every_number_of_processes_is_allowed(nvml: Any, num_processes: Any, count: int) -> None:
    nvml([])

    with allot_devices(num_processes) as (allotted, locks):
        assert (allotted, locks) == (count, [])
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
