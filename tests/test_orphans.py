import importlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY

from pdf2lora.errors import InputError
from pdf2lora.runtime import processes
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.processes import single_instance

# Stands in for dvc: starts the launcher with DVC_STAGE set, which starts the stage, as a shell does.
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
SAVE_FIRST = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit()))
"""
STAGE_THAT_SAVES = SAVE_FIRST + STAGE


@pytest.fixture
def started(start_python):
    """dvc's process, and the pids of the stage, the launcher and dvc, as the stage sees them."""

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


def test_a_stage_sees_its_launcher_and_dvc_and_nobody_above(started):
    dvc, (_, launcher, seen) = started()

    assert (launcher, seen) == (psutil.Process(dvc.pid).children()[0].pid, dvc.pid)


@pytest.mark.parametrize("killed", ["dvc", "launcher"])
def test_a_stage_ends_with_the_processes_above_it(started, killed):
    dvc, (stage, launcher, _) = started()

    psutil.Process(launcher if killed == "launcher" else dvc.pid).kill()

    assert has_ended(stage)


def test_an_orphan_is_told_by_sigterm_and_can_save(started):
    dvc, (stage, launcher, _) = started(STAGE_THAT_SAVES)

    psutil.Process(launcher).kill()

    assert dvc.stdout.readline() == "saved\n"
    assert has_ended(stage)


def test_an_orphan_from_birth_ends_too(monkeypatch):
    """dvc died before its stage could look: what stands above then is the process that adopts orphans."""
    init = type(
        "Init",
        (),
        {"pid": 1, "cmdline": lambda self: ["/sbin/init"], "is_running": lambda self: True, "status": lambda self: ""},
    )()
    told = []
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: told.append(number))

    processes._watch([init])

    assert told == [signal.SIGTERM]


def test_a_stage_that_dvc_did_not_start_watches_nobody(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(processes.threading, "Thread", lambda **_: pytest.fail("a watch was started"))

    processes.exit_with_parent()


HOLDER = """
import sys, time
from pdf2lora.runtime.processes import single_instance

@single_instance
def main():
    print("at work", flush=True)
    time.sleep(float(sys.argv[1]))

main()
"""


@pytest.fixture
def at_work(start_python, tmp_path, monkeypatch):
    """A stage of this file's name at work in tmp_path for some seconds."""
    monkeypatch.chdir(tmp_path)

    def start(seconds):
        file = tmp_path / f"{Path(__file__).stem}.py"
        file.write_text(HOLDER)
        holder = start_python(f"import runpy, sys; runpy.run_path({str(file)!r})", seconds)
        assert holder.stdout.readline() == "at work\n"
        return holder

    return start


def test_a_stage_waits_for_its_orphan_to_end(at_work, capsys):
    holder = at_work(1.5)
    ran = []

    single_instance(lambda: ran.append(holder.poll()))()

    assert len(ran) == 1
    assert capsys.readouterr().out == (
        f"test_orphans: waits for process {holder.pid}, which is at work on the same, to end\n"
    )


def test_a_stage_does_not_run_beside_another_that_stays(at_work, monkeypatch):
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0.5)
    holder = at_work(60)

    with pytest.raises(InputError) as refused:
        single_instance(lambda: pytest.fail("both at work"))()

    assert str(refused.value) == (
        f".scratch/at_work/test_orphans: process {holder.pid} is already at work on these very settings and data; "
        "wait for it or end it"
    )


@pytest.mark.parametrize("stage", sorted(file.stem for file in (REPOSITORY / "stages").glob("[!_]*.py")))
def test_every_stage_runs_alone(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0)
    folder = tmp_path / ".scratch/at_work" / stage
    folder.mkdir(parents=True)

    with exclusive_lock(folder), pytest.raises(SystemExit) as refused:
        importlib.import_module(f"stages.{stage}").main()

    assert str(refused.value) == (
        f"error: .scratch/at_work/{stage}: process {os.getpid()} is already at work on these very settings and data; "
        "wait for it or end it"
    )


def test_the_stages_package_watches(start_python):
    """Every stage imports it first, and so do the processes that a stage starts."""
    code = "import stages, threading; print([t.name for t in threading.enumerate() if '_watch' in t.name])"
    with_stage = start_python("import os; os.environ['DVC_STAGE'] = 'split'; " + code)

    assert "_watch" in with_stage.communicate()[0]
    assert "_watch" not in start_python("import os; os.environ.pop('DVC_STAGE', 0); " + code).communicate()[0]
