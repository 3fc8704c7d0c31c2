import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from commands import mend_dvc

DVC = [str(Path(sys.executable).with_name("dvc"))]
PIPELINE = "stages: {copy: {cmd: cp source copy && echo ran >> log, deps: [source], outs: [copy]}}"


def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    names = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    return subprocess.run([*DVC, *arguments], capture_output=True, text=True, env=names)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    before = Path.cwd()
    os.chdir(folder)
    assert dvc("init", "--no-scm", "--quiet").returncode == 0
    Path("source").write_text("text")
    Path("dvc.yaml").write_text(PIPELINE)
    assert dvc("repro").returncode == 0
    os.chdir(before)
    return folder


def empty_rwlock() -> None:
    Path(".dvc/tmp/rwlock").write_text("")


def empty_lock() -> None:
    Path("dvc.lock").write_text("")


def run_cache_entry() -> Path:
    (run,) = Path(".dvc/cache/runs").glob("*/*/*")
    Path("dvc.lock").unlink()
    Path("copy").unlink()
    return run


def empty_run() -> None:
    run_cache_entry().unlink()


def half_run() -> None:
    run = run_cache_entry()
    run.with_name("tmp1").write_text(run.read_text()[:20])
    run.unlink()


def half_experiment() -> None:
    file = Path(mend_dvc.EXPERIMENTS) / "0a1b2c/0a1b2c.run"
    file.parent.mkdir(parents=True)
    file.write_text('{"git_url": "file:')


@pytest.mark.parametrize(
    ("damage", "mended"),
    [
        (empty_rwlock, ".dvc/tmp/rwlock"),
        (empty_lock, "dvc.lock"),
        (empty_run, ".dvc/cache/runs/"),
        (half_run, ".dvc/cache/runs/"),
        (half_experiment, ".dvc/tmp/exps/standalone/run/0a1b2c "),
    ],
)
def test_dvc_repro_runs_again(
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[], None],
    mended: str,
) -> None:
    subprocess.run(["cp", "-a", f"{pipeline}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    damage()

    mend_dvc.main()

    said = capsys.readouterr().out
    assert said.startswith(f"mend_dvc: {mended}")
    assert said.endswith(" was half-written and is removed\n")
    done = dvc("repro")
    assert done.returncode == 0, done.stderr
    assert Path("copy").read_text() == "text"


def test_dvc_itself_does_not_recover(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for mend_dvc; where this fails it can go."""
    subprocess.run(["cp", "-a", f"{pipeline}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    empty_rwlock()

    assert "RWLock-file" in dvc("repro").stderr


def test_what_is_whole_is_left_alone(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pipeline)
    files = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}

    mend_dvc.main()

    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()} == files


def test_nothing_is_removed_while_a_dvc_is_at_work(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline)
    monkeypatch.setattr(mend_dvc, "damaged", lambda root: [root / "dvc.lock"])
    dvc_that_waits = tmp_path / "dvc"
    dvc_that_waits.write_text("import time; print('up', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, str(dvc_that_waits)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with pytest.raises(SystemExit) as refused:
                mend_dvc.main()
        finally:
            process.kill()
    assert refused.value.code == (
        f"error: dvc.lock: cannot be read, and process {process.pid} is at work; wait for it or end it"
    )


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """`dvc exp run --temp`, whose stage has begun."""
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "somebody")
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert dvc("init", "--quiet").returncode == 0
    begun = tmp_path / "begun"
    Path("dvc.yaml").write_text(f"stages: {{wait: {{cmd: touch {begun} && sleep 60, outs: [copy]}}}}")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "pipeline"], check=True)
    command = [*DVC, "exp", "run", "--temp", "--name", "slow"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            while not begun.exists():
                assert run.poll() is None
                time.sleep(0.1)
            yield run
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def test_an_experiment_that_was_killed_counts_as_running_no_more(
    experiment: "subprocess.Popen[bytes]", capsys: pytest.CaptureFixture[str]
) -> None:
    os.killpg(experiment.pid, signal.SIGKILL)
    experiment.wait()
    assert "Running" in dvc("exp", "show", "--no-pager", "--csv").stdout  # the reason for mending

    mend_dvc.main()

    (copy,) = Path(".dvc/tmp/exps/standalone").resolve().glob("tmp*")
    assert capsys.readouterr().out == (
        f"mend_dvc: experiment slow was killed and counts as running no more; its copy can be deleted: rm -r {copy}\n"
    )
    shown = dvc("exp", "show", "--no-pager", "--csv")
    assert shown.returncode == 0
    assert "Running" not in shown.stdout
    mend_dvc.main()
    assert capsys.readouterr().out == ""


def test_an_experiment_that_runs_is_left_alone(
    experiment: "subprocess.Popen[bytes]", capsys: pytest.CaptureFixture[str]
) -> None:
    mend_dvc.main()

    assert capsys.readouterr().out == ""
    assert "Running" in dvc("exp", "show", "--no-pager", "--csv").stdout


def test_an_experiment_whose_dvc_was_killed_runs_until_its_stage_has_ended(
    experiment: "subprocess.Popen[bytes]", capsys: pytest.CaptureFixture[str]
) -> None:
    experiment.kill()
    experiment.wait()

    mend_dvc.main()

    assert capsys.readouterr().out == ""


def test_a_folder_without_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        mend_dvc.main()
    assert refused.value.code == f"error: {tmp_path} holds no .dvc; run from the folder that holds dvc.yaml"
