"""Starts the processes of one job on this machine, watches them and ends all of them when one fails.

The launcher imports no heavy package. Each process of the job is `python -m <module>` with the variables that torchrun
sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). It reports over a pipe: a heartbeat each second, and its
error if it fails. torchrun and accelerate launch can start the same module. Then this launcher is not used, and no GPU
is locked.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from pdf2lora.errors import InputError, user_message
from pdf2lora.runtime.gpus import reserve_gpus, visible_gpus
from pdf2lora.runtime.parallel import num_cores

PIPE = "PDF2LORA_STATUS_PIPE"  # the environment variable that holds the file descriptor
HEARTBEAT_S = 1.0
SILENCE_S = 30.0  # a process without a heartbeat for this time does not answer
GRACE_S = 5.0  # after the first failure, the other processes have this time to report their errors
SAVE_S = 45.0  # the same after a signal: the main process may still be saving a checkpoint
ORPHAN_S = 45.0  # a process whose launcher has ended ends within this time
FORWARD_AFTER_S = 0.3  # the terminal sends Ctrl-C to all processes itself

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

Kind = Literal["input_error", "system_error", "stopped", "interrupted", "failed", "lost_peer"]


class PeerLost(Exception):
    """A collective failed because another process of the job has ended."""


class Stopped(Exception):
    """A signal stopped the job after its state was saved. `str(error)` is the line for the user."""


def is_worker() -> bool:
    """Whether a launcher (this one, torchrun or accelerate launch) started this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def is_main_process() -> bool:
    """Whether this process writes the outputs of its job. Without the variables of a launcher, each process is one."""
    return os.environ.get("RANK", "0") == "0"


def run_in_processes(module: str, work: Callable[[], None], num_processes: int | Literal["auto"]) -> None:
    """Calls `work` in each process of the job: in this process if the job has one, else in processes that run `module`.

    num_processes: `auto` starts one process per visible GPU, or one process without a GPU.

    Raises:
        InputError: there are fewer GPUs than processes, or a process failed.
        SystemExit: a signal stopped the job.
    """
    if is_worker():
        _require_all_processes()
        _work_and_report(work)
        return
    with allot_devices(num_processes) as (count, locks):
        if count > 1:
            _launch(module, count, locks)
        else:
            _work_alone(work)


def _work_alone(work: Callable[[], None]) -> None:
    try:
        work()
    except Stopped as stopped:
        sys.exit(str(stopped))


def _require_all_processes() -> None:
    """Raises InputError if accelerate launch started only one of several processes."""
    variables = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    is_single = not any(name in os.environ for name in variables)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and is_single:
        raise InputError(
            "accelerate launch: --num_processes is more than 1, but only one process was started: on a CPU accelerate "
            "needs mpirun for several. Use --multi_gpu (also on a CPU), torchrun, or compute.num_processes."
        )


@contextmanager
def allot_devices(num_processes: int | Literal["auto"]) -> Iterator[tuple[int, list[int]]]:
    """Yields the number of processes and the file descriptors of the GPU locks that they hold.

    Sets CUDA_VISIBLE_DEVICES to the locked GPUs. So call it before torch is imported.

    Raises InputError if there are fewer GPUs than processes.
    """
    gpus = visible_gpus()
    count = (len(gpus) or 1) if num_processes == "auto" else num_processes
    if gpus and count > len(gpus):
        raise InputError(
            f"compute.num_processes is {count}; there are {len(gpus)} visible GPUs, and one process uses one GPU. "
            "Use a smaller number or auto."
        )
    if not gpus:
        yield count, []
        return
    with reserve_gpus(gpus, count) as (reserved, locks):
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(reserved)}
        yield count, locks


def job_environments(count: int) -> list[dict[str, str]]:
    """The variables of each process of a job on this machine. A job of one process needs none."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // count))),
    }
    return [shared | {"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(count)]


# The launcher's side


@dataclass
class _Worker:
    """One process of the job, from the launcher's side."""

    index: int
    process: subprocess.Popen[bytes]
    pipe: int
    last_heartbeat: float = field(default_factory=time.monotonic)
    text: bytes = b""
    kind: Kind | None = None
    message: str = ""

    def read(self) -> None:
        """Reads all that the process has written to the pipe."""
        with suppress(BlockingIOError):
            while chunk := os.read(self.pipe, 65536):
                self.last_heartbeat = time.monotonic()
                self.text += chunk
        *lines, self.text = self.text.split(b"\n")
        for line in filter(None, lines):
            report: dict[str, Any] = json.loads(line)
            self.kind, self.message = report["kind"], report["message"]


def _launch(module: str, count: int, locks: list[int]) -> None:
    name = module.rpartition(".")[2]
    workers = _start(module, count, locks)
    signals: list[tuple[float, int]] = []
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores
    before = {number: signal.signal(number, lambda n, _: signals.append((time.monotonic(), n))) for number in handled}
    try:
        _watch(name, workers, signals)
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            os.close(worker.pipe)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(module: str, count: int, locks: list[int]) -> list[_Worker]:
    workers = []
    for index, environment in enumerate(job_environments(count)):
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=os.environ | environment | {PIPE: str(theirs)},
            pass_fds=[theirs, *locks],
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        workers.append(_Worker(index, process, ours))
    return workers


def _watch(name: str, workers: list[_Worker], signals: list[tuple[float, int]]) -> None:
    """Returns when all processes have ended without an error.

    Raises:
        InputError: a process failed or does not answer.
        SystemExit: a signal stopped the job.
    """
    forwarded = False
    first_failure: float | None = None
    last_poll = time.monotonic()
    while True:
        select.select([worker.pipe for worker in workers if worker.process.poll() is None], [], [], 0.1)
        now = time.monotonic()
        was_suspended = now - last_poll > SILENCE_S / 2  # Ctrl-Z suspends the other processes too
        last_poll = now
        for worker in workers:
            worker.read()
            if was_suspended:
                worker.last_heartbeat = now
        codes = [worker.process.poll() for worker in workers]
        if all(code == 0 for code in codes):
            return
        if signals and not forwarded and now - signals[0][0] > FORWARD_AFTER_S:
            forwarded = True  # a process that already got Ctrl-C from the terminal ignores this second signal
            for worker in workers:
                worker.process.send_signal(signal.SIGTERM)
        silent = [w for w in workers if w.process.poll() is None and now - w.last_heartbeat > SILENCE_S]
        if silent:
            worker = silent[0]
            raise InputError(
                f"{name}: process {worker.index} of {len(workers)} (pid {worker.process.pid}) has not answered for "
                f"{SILENCE_S:.0f} s, so all processes were ended. Check the machine (dmesg, nvidia-smi), then run "
                "dvc repro again: it resumes from the last checkpoint."
            )
        if any(code for code in codes):
            first_failure = first_failure or now
            if all(code is not None for code in codes) or now - first_failure > (SAVE_S if signals else GRACE_S):
                _raise_cause(name, workers, signals)


def _raise_cause(name: str, workers: list[_Worker], signals: list[tuple[float, int]]) -> None:
    """Raises the error of the process that failed first, not of those that failed because of it."""
    for worker in workers:
        worker.read()

    def weight(worker: _Worker) -> int:
        code = worker.process.poll()
        if worker.kind == "stopped":
            return 0
        if code is not None and code < 0:
            return 1
        return {"interrupted": 1, "input_error": 2, "system_error": 2, "failed": 3, "lost_peer": 5}.get(
            worker.kind or "", 4 if code else 6
        )

    worker = min(workers, key=weight)
    code = worker.process.poll()
    who = f"process {worker.index} of {len(workers)} (pid {worker.process.pid})"
    if worker.kind == "stopped":
        sys.exit(worker.message)
    if signals and (worker.kind == "interrupted" or (code and -code in STOP_SIGNALS)):
        sys.exit(f"{name}: stopped by {signal.Signals(signals[0][1]).name} without a new checkpoint")
    if code is not None and code < 0:
        raise InputError(
            f"{name}: {who} was ended by {signal.Signals(-code).name}, so the others were ended too. If memory ran "
            "out, free some (free -h, dmesg show it), then run dvc repro again: it resumes from the last checkpoint."
        )
    if worker.kind == "input_error":
        everywhere = all(other.message in ("", worker.message) for other in workers)
        raise InputError(worker.message if everywhere else f"{worker.message} ({who})")
    if worker.kind == "system_error":
        raise InputError(f"{name}: {who}: {worker.message}")
    raise RuntimeError(f"{name}: {who} failed: {worker.message or f'exit status {code}'}")


# The side of each process of the job


def _work_and_report(work: Callable[[], None]) -> None:
    """Runs `work`. Sends heartbeats while it runs, and its error if it fails."""
    if PIPE not in os.environ:  # started by torchrun or accelerate launch
        _work_alone(work)
        return
    pipe = int(os.environ.pop(PIPE))
    threading.Thread(target=_heartbeat, args=(pipe,), daemon=True).start()
    try:
        work()
        _end(0)
    except Stopped as error:
        kind, message = "stopped", str(error)
    except PeerLost as error:
        kind, message = "lost_peer", str(error)
    except KeyboardInterrupt:
        kind, message = "interrupted", ""
    except Exception as error:
        if text := user_message(error):
            kind, message = ("input_error" if isinstance(error, InputError) else "system_error"), text
        else:
            kind, message = "failed", f"{type(error).__name__}: {error}"
            sys.excepthook(type(error), error, error.__traceback__)
    with suppress(OSError):
        os.write(pipe, json.dumps({"kind": kind, "message": message}).encode() + b"\n")
    _end(1)


def _end(status: int) -> NoReturn:
    """Ends this process without Python's clean-up.

    During the clean-up no thread sends heartbeats, and a broken process group can wait for its peers.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _heartbeat(pipe: int) -> None:
    while True:
        try:
            os.write(pipe, b"\n")
        except OSError:  # the launcher has ended
            break
        time.sleep(HEARTBEAT_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os._exit(1)
