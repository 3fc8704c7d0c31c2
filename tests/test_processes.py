import importlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers import REPOSITORY

from pdf2lora.errors import InputError
from pdf2lora.runtime import processes
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.processes import single_instance

# Replaces dvc: sets DVC_STAGE and starts a launcher, which starts the stage, as a shell does.
DVC = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], env=os.environ | {"DVC_STAGE": "train"})
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""
STAGE = """
import os, time
from pdf2lora.runtime.processes import exit_with_parent, ancestor_processes
exit_with_parent()
print(os.getpid(), *[process.pid for process in ancestor_processes()], flush=True)
time.sleep(60)
"""
SAVE_ON_SIGTERM = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit()))
"""
STAGE_THAT_SAVES = SAVE_ON_SIGTERM + STAGE


@pytest.fixture
def start_dvc(start_python):
    """Starts dvc. Returns its process, and the pids of stage, launcher and dvc that the stage prints."""

    def start(stage=STAGE):
        dvc = start_python(DVC, LAUNCHER, stage)
        return dvc, [int(pid) for pid in dvc.stdout.readline().split()]

    return start


def has_ended(pid, within_s=10):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_ancestors_are_the_launcher_and_dvc(start_dvc):
    dvc, (_, launcher, dvc_pid) = start_dvc()

    assert (launcher, dvc_pid) == (psutil.Process(dvc.pid).children()[0].pid, dvc.pid)


@pytest.mark.parametrize("killed", ["dvc", "launcher"])
def test_stage_ends_when_an_ancestor_ends(start_dvc, killed):
    dvc, (stage, launcher, _) = start_dvc()

    psutil.Process(launcher if killed == "launcher" else dvc.pid).kill()

    assert has_ended(stage)


def test_orphan_ends_by_sigterm_and_can_save(start_dvc):
    dvc, (stage, launcher, _) = start_dvc(STAGE_THAT_SAVES)

    psutil.Process(launcher).kill()

    assert dvc.stdout.readline() == "saved\n"
    assert has_ended(stage)


def test_stage_ends_if_dvc_ended_before_the_watch_began(monkeypatch):
    """Then its only ancestor is init, which adopts orphans."""
    init = type(
        "Init",
        (),
        {"pid": 1, "cmdline": lambda self: ["/sbin/init"], "is_running": lambda self: True, "status": lambda self: ""},
    )()
    signals = []
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: signals.append(number))

    processes._watch_ancestors([init])

    assert signals == [signal.SIGTERM]


def test_stage_without_dvc_starts_no_watch(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(processes.threading, "Thread", lambda **_: pytest.fail("started a watch"))

    processes.exit_with_parent()


HOLDER = """
import sys, time
from pdf2lora.runtime.processes import single_instance

@single_instance
def main():
    print("running", flush=True)
    time.sleep(float(sys.argv[1]))

main()
"""


@pytest.fixture
def start_holder(start_python, tmp_path, monkeypatch):
    """Starts a stage with the name of this file, which holds its lock for some seconds."""
    monkeypatch.chdir(tmp_path)

    def start(seconds):
        file = tmp_path / f"{Path(__file__).stem}.py"
        file.write_text(HOLDER)
        holder = start_python(f"import runpy, sys; runpy.run_path({str(file)!r})", seconds)
        assert holder.stdout.readline() == "running\n"
        return holder

    return start


def test_stage_waits_until_its_orphan_ends(start_holder, capsys):
    holder = start_holder(1.5)
    ran = []

    single_instance(lambda: ran.append(holder.poll()))()

    assert len(ran) == 1
    assert capsys.readouterr().out == (f"test_processes: waiting for process {holder.pid}, which does the same work\n")


def test_stage_does_not_run_while_another_process_holds_its_lock(start_holder, monkeypatch):
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0.5)
    holder = start_holder(60)

    with pytest.raises(InputError) as raised:
        single_instance(lambda: pytest.fail("both run"))()

    assert str(raised.value) == (
        f".scratch/locks/test_processes is locked by process {holder.pid}. Wait until it ends, or end it."
    )


@pytest.mark.parametrize("stage", sorted(file.stem for file in (REPOSITORY / "stages").glob("[!_]*.py")))
def test_no_two_runs_of_a_stage_overlap(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0)
    folder = tmp_path / ".scratch/locks" / stage
    folder.mkdir(parents=True)

    with exclusive_lock(folder), pytest.raises(SystemExit) as raised:
        importlib.import_module(f"stages.{stage}").main()

    assert str(raised.value) == (
        f"error: .scratch/locks/{stage} is locked by process {os.getpid()}. Wait until it ends, or end it."
    )


def test_importing_stages_starts_the_watch(start_python):
    """Every stage, and every process that a stage starts, imports this package first."""
    code = "import stages, threading; print([t.name for t in threading.enumerate() if '_watch' in t.name])"
    with_stage = start_python("import os; os.environ['DVC_STAGE'] = 'split'; " + code)

    assert "_watch" in with_stage.communicate()[0]
    assert "_watch" not in start_python("import os; os.environ.pop('DVC_STAGE', 0); " + code).communicate()[0]
