"""The processes of find_batch: their answers and their failures.

They are forks with a prober that needs no model. What it does depends on the value of gradient_checkpointing.
"""

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_llama import byte_tokenizer

from pdf2lora.errors import InputError
from pdf2lora.params import Params, read_params
from pdf2lora.runtime.launcher import PeerLost
from pdf2lora.token_files import encode_texts, write_tokens
from pdf2lora.tokens import Encoder
from pdf2lora.training import probe, probe_processes
from pdf2lora.training.batch_search import Measurement
from pdf2lora.training.probe_processes import Capabilities, OutOfMemory, ProbeProcesses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot be forked")


class FakeProber:
    """It works in the folder of the test: each measurement adds a line with its pid to `pids`."""

    def __init__(self, params: Params):
        self.folder, self.index = Path.cwd(), int(os.environ.get("RANK", "0"))
        self.num_measurements = 0
        if (self.folder / "refuse").exists():
            raise InputError("compute.attention: 'flash_attention_2' cannot run here")

    def capabilities(self) -> Capabilities:
        return Capabilities(os.environ.get("WORLD_SIZE", "1"), "reference", ("full",), 0.0, ("gpu",), 0.0)

    def measure(self, base: Path, sequences: Any, kind: str, batch: int, budget_gib: float, placement: str) -> Any:
        assert len(sequences) == 2
        with (self.folder / "pids").open("a") as pids:
            print(os.getpid(), file=pids, flush=True)
        self.num_measurements += 1
        kind, _, where = kind.partition(" in ")
        if where and self.index != int(where):
            time.sleep(0 if kind.startswith("clean") else 60)  # waits in a collective
            kind = "clean OOM" if kind.startswith("clean") else kind
        return getattr(self, kind.replace(" ", "_"))(batch)

    def ok(self, batch: int) -> Measurement:
        return Measurement(batch, self.num_measurements)

    def clean_OOM(self, batch: int) -> OutOfMemory:
        return OutOfMemory(is_clean=True)

    def unclean_OOM(self, batch: int) -> OutOfMemory:
        return OutOfMemory(is_clean=False)

    def CPU_OOM(self, batch: int) -> None:
        torch.empty(2**55)

    def numpy_OOM(self, batch: int) -> None:
        raise MemoryError

    def killed(self, batch: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_once(self, batch: int) -> Measurement:
        if len((self.folder / "pids").read_text().splitlines()) == 1:
            self.killed(batch)
        return self.ok(batch)

    def crash(self, batch: int) -> None:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(self, batch: int) -> None:
        os._exit(3)

    def refuse(self, batch: int) -> None:
        raise InputError("quantization.bits: 4 is not possible here")

    def fail(self, batch: int) -> None:
        raise KeyError("lm_head")

    def fail_of_a_peer(self, batch: int) -> None:
        if self.index == 0:
            raise PeerLost("Connection closed by peer")
        time.sleep(0.3)
        raise KeyError("lm_head")

    def miss(self, batch: int) -> None:
        raise ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_params: Callable[..., Path]
) -> Iterator[Callable[..., ProbeProcesses]]:
    """The tokens of the project are two sequences."""
    monkeypatch.chdir(tmp_path)
    params = read_params(write_params())
    (tmp_path / "data/tokens").mkdir(parents=True)
    text = "x" * 2 * params.compute.seq_length
    encoder = Encoder(byte_tokenizer(), bos=None, eos=1)
    write_tokens(tmp_path / "data/tokens", "train", encode_texts(encoder, [text]), encoder)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(probe_processes.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(probe, "Prober", FakeProber)
    monkeypatch.setattr(probe_processes, "GRACE_S", 0.5)
    started: list[ProbeProcesses] = []

    def start(count: int = 1) -> ProbeProcesses:
        started.append(ProbeProcesses(params, count))
        return started[-1]

    yield start
    for processes in started:
        processes.end()


Start = Callable[..., ProbeProcesses]
counts = pytest.mark.parametrize("count", [1, 2, 3])


def pids(processes: ProbeProcesses) -> list[int]:
    return [process.pid for process in processes.processes]


def are_gone(ended: list[int]) -> bool:
    """Checks that the processes have ended and are not zombies."""
    return not any(psutil.pid_exists(pid) for pid in ended)


@counts
def test_processes_answer_and_stay(start: Start, count: int) -> None:
    with start(count) as processes:
        first = pids(processes)
        assert len(first) == count
        assert processes.capabilities().device == str(count)

        answers = [processes.measure("ok", batch, 1.0, "gpu") for batch in (5, 7)]

        assert answers == [Measurement(5, 1), Measurement(7, 2)]
        assert pids(processes) == first
    assert are_gone(first)


@counts
def test_processes_start_again_after_their_end(start: Start, count: int) -> None:
    processes = start(count)
    first = pids(processes)

    processes.end()
    processes.end()  # a second time changes nothing

    assert are_gone(first)
    assert processes.measure("ok", 5, 1.0, "gpu") == Measurement(5, 1)


@counts
def test_processes_that_gave_all_memory_back_stay(start: Start, count: int) -> None:
    processes = start(count)
    first = pids(processes)

    assert processes.measure("clean OOM", 5, 1.0, "gpu") is None

    assert pids(processes) == first
    assert processes.measure("ok", 5, 1.0, "gpu") == Measurement(5, 2)


@pytest.mark.parametrize("kind", ["unclean OOM", "CPU OOM", "numpy OOM"])
@counts
def test_processes_without_memory_are_replaced(start: Start, count: int, kind: str) -> None:
    processes = start(count)
    first = pids(processes)

    assert processes.measure(kind, 5, 1.0, "gpu") is None

    assert are_gone(first)
    assert processes.measure("ok", 5, 1.0, "gpu") == Measurement(5, 1)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", ["unclean OOM", "CPU OOM", "numpy OOM"])
def test_one_process_without_memory_leaves_no_other_waiting(start: Start, kind: str, index: int) -> None:
    """The other processes wait for it in a collective, but it has ended."""
    processes = start(3)
    first = pids(processes)
    started = time.monotonic()

    assert processes.measure(f"{kind} in {index}", 5, 1.0, "gpu") is None

    assert time.monotonic() - started < 10
    assert are_gone(first)


@counts
def test_a_request_is_repeated_after_a_process_was_killed_once(start: Start, count: int, tmp_path: Path) -> None:
    processes = start(count)
    first = pids(processes)

    kind = "killed once" if count == 1 else "ok"
    if count > 1:
        os.kill(first[1], signal.SIGKILL)

    assert processes.measure(kind, 5, 1.0, "gpu") == Measurement(5, 1)

    assert are_gone(first)


@pytest.mark.parametrize("kind", ["killed", "killed in 0", "killed in 2"])
def test_processes_that_are_killed_twice_ran_out_of_memory(start: Start, tmp_path: Path, kind: str) -> None:
    processes = start(3)

    assert processes.measure(kind, 5, 1.0, "gpu") is None

    measured = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
    assert len(measured) == 6
    assert are_gone(list(measured))
    assert processes.measure("ok", 5, 1.0, "gpu") == Measurement(5, 1)


@pytest.mark.parametrize(("kind", "code"), [("crash", -11), ("leave", 3), ("leave in 1", 3)])
def test_a_crash_is_not_lack_of_memory(start: Start, kind: str, code: int) -> None:
    processes = start(2)
    first = pids(processes)

    with pytest.raises(RuntimeError, match=rf"ended its process with exit code {code}"):
        processes.measure(kind, 5, 1.0, "gpu")

    assert are_gone(first)


@pytest.mark.parametrize("kind", ["refuse", "refuse in 1"])
def test_an_input_error_passes_through(start: Start, kind: str) -> None:
    processes = start(2)
    first = pids(processes)

    with pytest.raises(InputError, match=r"^quantization\.bits: 4 is not possible here$"):
        processes.measure(kind, 5, 1.0, "gpu")

    assert are_gone(first)


def test_an_input_error_before_the_first_request_passes_through(start: Start, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()

    with pytest.raises(InputError, match="'flash_attention_2' cannot run here"):
        start(2).capabilities()


def test_a_missing_library_keeps_its_name(start: Start) -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        start().measure("miss", 5, 1.0, "gpu")

    assert caught.value.name == "peft.tuners"


@pytest.mark.parametrize("kind", ["fail", "fail of a peer"])
def test_another_error_keeps_its_text_and_the_cause_comes_first(start: Start, kind: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        start(2).measure(kind, 5, 1.0, "gpu")

    assert "KeyError: 'lm_head'" in str(caught.value)


def test_out_of_memory_before_the_model_is_loaded_is_reported_in_one_line(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeProber, "capabilities", lambda prober: os.kill(os.getpid(), signal.SIGKILL))

    with pytest.raises(InputError) as caught:
        start(2).capabilities()

    for words in ("find_batch: memory ran out", "free -h", "dvc repro"):
        assert words in str(caught.value)


def test_a_process_that_does_not_answer_is_reported_in_one_line(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_processes, "ANSWER_S", 0.7)
    processes = start(2)
    first = pids(processes)

    with pytest.raises(InputError, match="process 0 of 2 has not answered"):
        processes.measure("leave in 9", 5, 1.0, "gpu")

    assert are_gone(first)


def test_end_does_not_wait_for_a_measurement(start: Start) -> None:
    processes = start(2)
    with suppress(Exception):
        processes.pipes[0].send(None)
    started = time.monotonic()

    processes.end()

    assert time.monotonic() - started < 5
