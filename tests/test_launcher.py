"""The launcher: start, supervision and end of the processes of a job, which run a small module without torch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers import REPOSITORY

# A stage in several processes. Its argument is the number of processes. Each one writes its pid and its variables to a
# file, then runs the function of the file work.py. MODULE_SILENCE_S shortens the time after which a process is silent.
STAGE = """
import json, os, sys
from pathlib import Path
from pdf2lora.errors import report_input_errors
from pdf2lora.runtime import launcher

launcher.SILENCE_S, launcher.GRACE_S, launcher.HEARTBEAT_S, launcher.ORPHAN_S = 6.0, 1.0, 0.2, 1.0
index = os.environ.get("RANK", "launcher")
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
Path(f"started-{index}.partial").write_text(json.dumps({"pid": os.getpid(), **{n: os.environ.get(n) for n in names}}))
os.rename(f"started-{index}.partial", f"started-{index}")


def work():
    from work import work

    work(index)


@report_input_errors
def main():
    launcher.run_in_processes("job.stage", work, int(Path("count").read_text()))


if __name__ == "__main__":
    main()
"""
IMPORTS = """
import os, signal, sys, time
from pathlib import Path
from pdf2lora.errors import InputError
from pdf2lora.runtime.launcher import PeerLost, Stopped
"""
SAVE_ON_SIGTERM = """
def work(index):
    received = []
    def note(number, frame):
        received.append(number)
        with open(f"signals-{index}", "a") as file:
            print(signal.Signals(number).name, file=file, flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    Path(f"ready-{index}").touch()
    while not received:
        time.sleep(0.02)
    time.sleep(1)
    raise Stopped("stage: stopped by a signal, a checkpoint is saved")
"""


class Job:
    def __init__(self, folder: Path, process: "subprocess.Popen[str]", count: int):
        self.folder, self.process, self.count = folder, process, count

    def wait(self, timeout_s: float = 30) -> tuple[int, str, list[str]]:
        """Exit status, stdout and the lines of stderr."""
        output, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output, errors.splitlines()

    def wait_for(self, name: str) -> None:
        """Waits until each process has written its file of this name."""
        until = time.monotonic() + 20
        while not all((self.folder / f"{name}-{index}").exists() for index in range(self.count)):
            assert time.monotonic() < until, f"no {name}: {list(self.folder.iterdir())}"
            assert self.process.poll() is None
            time.sleep(0.02)

    def variables(self, index: int) -> dict[str, str]:
        return dict(json.loads((self.folder / f"started-{index}").read_text()))

    def workers(self) -> list[psutil.Process]:
        self.wait_for("started")
        return [psutil.Process(int(self.variables(index)["pid"])) for index in range(self.count)]


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_in(folder: Path) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and is_running(process):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts a job with the body of work.py. At the end of the test none of its processes may run."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job/__init__.py").touch()
    (tmp_path / "job/stage.py").write_text(STAGE)
    jobs: list[Job] = []

    def start(work: str, *, count: int = 2, environment: dict[str, str] | None = None) -> Job:
        (tmp_path / "work.py").write_text(IMPORTS + work)
        (tmp_path / "count").write_text(str(count))
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "DVC_STAGE")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        process = subprocess.Popen(
            [sys.executable, "-m", "job.stage"],
            cwd=tmp_path,
            env=inherited | {"PYTHONPATH": str(REPOSITORY)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        jobs.append(Job(tmp_path, process, count))
        return jobs[-1]

    yield start
    until = time.monotonic() + 10
    while (left := processes_in(tmp_path)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in left:
        process.kill()
    for job in jobs:
        job.process.kill()
        job.process.communicate()
    assert not left, "processes were left running"


Start = Callable[..., Job]


# The end of a job


@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_end_well(start: Start, count: int) -> None:
    job = start("def work(index): os.write(1, b'done\\n')", count=count)

    assert job.wait() == (0, "done\n" * count, [])

    variables = [job.variables(index) for index in range(count)]
    for index, of_process in enumerate(variables):
        assert (of_process["RANK"], of_process["LOCAL_RANK"]) == (str(index), str(index))
        assert (of_process["WORLD_SIZE"], of_process["LOCAL_WORLD_SIZE"]) == (str(count), str(count))
        assert of_process["MASTER_ADDR"] == "127.0.0.1"
        assert int(of_process["OMP_NUM_THREADS"]) >= 1
    assert len({of_process["MASTER_PORT"] for of_process in variables}) == 1
    assert len({of_process["pid"] for of_process in variables} | {str(job.process.pid)}) == count + 1


def test_a_slow_end_of_python_does_not_count_as_silence(start: Start) -> None:
    job = start("import atexit\ndef work(index):\n atexit.register(time.sleep, 60)\n print('done')")

    assert job.wait() == (0, "done\ndone\n", [])


def test_one_process_is_the_stage_itself(start: Start) -> None:
    job = start("def work(index): print(index)", count=1)

    assert job.wait() == (0, "launcher\n", [])

    assert not (job.folder / "started-0").exists()


def test_a_process_of_another_launcher_starts_no_others(start: Start) -> None:
    """As torchrun starts it."""
    job = start("def work(index): print(index)", count=2, environment={"RANK": "1", "WORLD_SIZE": "2"})

    assert job.wait() == (0, "1\n", [])

    assert not (job.folder / "started-launcher").exists()
    assert not (job.folder / "started-0").exists()


def test_accelerate_launch_that_starts_one_of_several_processes_is_refused(start: Start) -> None:
    """As `accelerate launch --cpu --num_processes 2` does."""
    variables = {"ACCELERATE_MIXED_PRECISION": "bf16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    job = start("def work(index): print(index)", environment=variables)

    status, output, errors = job.wait()

    assert (status, output, len(errors)) == (1, "", 1)
    for words in ("error: accelerate launch", "--num_processes", "--multi_gpu", "torchrun"):
        assert words in errors[0]


def test_accelerate_launch_of_one_process_works(start: Start) -> None:
    job = start("def work(index): print(index)", environment={"ACCELERATE_MIXED_PRECISION": "bf16"})

    assert job.wait() == (0, "launcher\n", [])


def test_threads_that_the_user_sets_stay(start: Start) -> None:
    job = start("def work(index): pass", environment={"OMP_NUM_THREADS": "7"})

    assert job.wait()[0] == 0

    assert job.variables(1)["OMP_NUM_THREADS"] == "7"


def test_an_input_error_of_all_processes_is_reported_once(start: Start) -> None:
    job = start("def work(index): raise InputError('train.seed: 5 is odd')")

    assert job.wait() == (1, "", ["error: train.seed: 5 is odd"])


def test_an_input_error_of_one_process_ends_the_others(start: Start) -> None:
    job = start("def work(index):\n if index == '1': raise InputError('no memory')\n time.sleep(60)")

    status, _, errors = job.wait()

    assert status == 1
    assert errors == ["error: no memory"]


def test_different_input_errors_name_the_process(start: Start) -> None:
    job = start("def work(index): raise InputError(f'no memory on {index}')")

    status, _, errors = job.wait()

    assert (status, len(errors)) == (1, 1)
    assert "no memory on 0 (process 0 of 2 (pid" in errors[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("OSError(28, 'No space left on device', 'logs')", "logs: No space left on device. Free space on that disk"),
        ("MemoryError()", "memory ran out. Free some (free -h shows it)"),
        (
            'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 64 bytes.")',
            "memory ran out. Free some (free -h shows it)",
        ),
    ],
)
def test_a_full_disk_or_memory_names_the_process(start: Start, error: str, message: str) -> None:
    job = start(f"def work(index):\n if index == '1': raise {error}\n time.sleep(60)")

    *_, [line] = job.wait()

    who = f"process 1 of 2 (pid {job.variables(1)['pid']})"
    assert line.startswith(f"error: stage: {who}: {message}")
    assert line.endswith(", then run again. Finished work is kept.")


def test_an_error_of_a_process_comes_before_those_that_it_causes(start: Start) -> None:
    """The process that ends first is not the cause."""
    job = start(
        "def work(index):\n if index == '0': raise PeerLost('connection closed')\n"
        " time.sleep(0.3)\n raise KeyError('lm_head')"
    )

    status, _, errors = job.wait()

    assert status == 1
    assert "RuntimeError: stage: process 1 of 2 (pid" in errors[-1]
    assert "KeyError: 'lm_head'" in errors[-1]
    assert any(line.startswith("Traceback") for line in errors)


def test_a_process_that_exits_is_found(start: Start) -> None:
    job = start("def work(index):\n if index == '1': os._exit(3)\n time.sleep(60)")

    status, _, errors = job.wait()

    assert status == 1
    assert "process 1 of 2" in errors[-1]
    assert "exit status 3" in errors[-1]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_killed_process_ends_the_others_and_is_named(start: Start, index: int) -> None:
    job = start("def work(index): time.sleep(60)", count=3)
    victim = job.workers()[index]

    victim.kill()

    status, _, errors = job.wait(10)
    assert status == 1
    assert len(errors) == 1
    for words in (f"process {index} of 3 (pid {victim.pid})", "SIGKILL", "dvc repro"):
        assert words in errors[0]


def test_a_killed_process_is_named_and_not_the_peer_that_lost_it(start: Start) -> None:
    job = start(
        "def work(index):\n if index == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        " time.sleep(0.2)\n raise PeerLost('connection closed')"
    )

    _, _, errors = job.wait()

    assert len(errors) == 1
    assert "process 1 of 2" in errors[0]
    assert "SIGKILL" in errors[0]


def test_a_process_that_does_not_answer_is_found(start: Start) -> None:
    job = start("def work(index): time.sleep(60)")
    victim = job.workers()[1]
    time.sleep(0.5)

    victim.suspend()

    status, _, errors = job.wait(15)
    assert status == 1
    assert len(errors) == 1
    for words in (f"process 1 of 2 (pid {victim.pid})", "has not answered", "dvc repro"):
        assert words in errors[0]


def test_a_job_that_was_suspended_continues(start: Start) -> None:
    """Ctrl-Z, and then fg after a longer time than SILENCE_S."""
    job = start("def work(index):\n Path(f'ready-{index}').touch()\n time.sleep(1)\n os.write(1, b'done\\n')")
    job.wait_for("ready")

    os.killpg(job.process.pid, signal.SIGSTOP)
    time.sleep(7.5)
    os.killpg(job.process.pid, signal.SIGCONT)

    assert job.wait() == (0, "done\ndone\n", [])


# Signals


def test_sigterm_reaches_all_processes_once(start: Start) -> None:
    """The processes have time to save a checkpoint."""
    job = start(SAVE_ON_SIGTERM)
    job.wait_for("ready")

    job.process.send_signal(signal.SIGTERM)

    assert job.wait() == (1, "", ["stage: stopped by a signal, a checkpoint is saved"])
    for index in range(2):
        assert (job.folder / f"signals-{index}").read_text() == "SIGTERM\n"


def test_ctrl_c_of_the_terminal_ends_the_job(start: Start) -> None:
    """The terminal sends SIGINT to the whole group. The processes then ignore the launcher's SIGTERM."""
    job = start(SAVE_ON_SIGTERM)
    job.wait_for("ready")

    os.killpg(job.process.pid, signal.SIGINT)

    assert job.wait() == (1, "", ["stage: stopped by a signal, a checkpoint is saved"])
    for index in range(2):
        signals = (job.folder / f"signals-{index}").read_text().split()
        assert signals.count("SIGINT") == 1
        assert signals[0] == "SIGINT"


def test_ctrl_c_of_the_launcher_alone_reaches_all(start: Start) -> None:
    job = start(SAVE_ON_SIGTERM)
    job.wait_for("ready")

    job.process.send_signal(signal.SIGINT)

    assert job.wait() == (1, "", ["stage: stopped by a signal, a checkpoint is saved"])
    assert (job.folder / "signals-1").read_text() == "SIGTERM\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_training_is_reported_in_one_line(start: Start, number: signal.Signals) -> None:
    """The processes have no handler yet. The message must not blame a lack of memory."""
    job = start("def work(index):\n Path(f'ready-{index}').touch()\n time.sleep(60)")
    job.wait_for("ready")

    os.killpg(job.process.pid, number)

    status, output, errors = job.wait()
    assert (status, output) == (1, "")
    (line,) = [line for line in errors if line.startswith("stage: ")]
    assert number.name in line
    assert "memory" not in line


def test_a_signal_that_the_launcher_ignores_reaches_nobody(start: Start) -> None:
    """Under nohup, the end of the terminal does not end the training."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, '-m', 'job.stage'])"
    )
    job = start("def work(index):\n Path(f'ready-{index}').touch()\n time.sleep(1)\n os.write(1, b'done\\n')", count=2)
    assert job.wait()[0] == 0
    for file in job.folder.glob("*-[01]"):
        file.unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=job.folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ignoring = Job(job.folder, process, 2)
    ignoring.wait_for("ready")

    os.killpg(process.pid, signal.SIGHUP)

    assert ignoring.wait() == (0, "done\ndone\n", [])


def test_kill_9_of_the_launcher_ends_the_processes(start: Start) -> None:
    job = start("def work(index): time.sleep(60)")
    workers = job.workers()

    job.process.kill()

    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [process for process in alive if is_running(process)]


def test_kill_9_of_the_launcher_lets_the_processes_save(start: Start) -> None:
    """A process that does not end by SIGTERM is ended too."""
    job = start(
        "def work(index):\n"
        " signal.signal(signal.SIGTERM, lambda *_: Path(f'saved-{index}').touch())\n"
        " Path(f'ready-{index}').touch()\n time.sleep(60)\n time.sleep(60)"
    )
    job.wait_for("ready")
    workers = job.workers()

    job.process.kill()
    job.process.wait()

    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [process for process in alive if is_running(process)]
    assert {file.name for file in job.folder.glob("saved-*")} == {"saved-0", "saved-1"}
