import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from helpers import REPOSITORY
from ruamel.yaml import YAML

from commands import mend_dvc

DVC = [str(Path(sys.executable).with_name("dvc"))]
PIPELINE = "stages: {copy: {cmd: cp source copy && echo ran >> log, deps: [source], outs: [copy]}}"


def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    names = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    return subprocess.run([*DVC, *arguments], capture_output=True, text=True, env=names)


def reproduce() -> None:
    with closing(Repo()) as repo:
        repo.reproduce()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    before = Path.cwd()
    os.chdir(folder)
    Repo.init(no_scm=True).close()
    Path("source").write_text("text")
    Path("dvc.yaml").write_text(PIPELINE)
    reproduce()
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
    ("damage", "path"),
    [
        (empty_rwlock, ".dvc/tmp/rwlock"),
        (empty_lock, "dvc.lock"),
        (empty_run, ".dvc/cache/runs/"),
        (half_run, ".dvc/cache/runs/"),
        (half_experiment, ".dvc/tmp/exps/standalone/run/0a1b2c,"),
    ],
)
def test_dvc_repro_runs_again(
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[], None],
    path: str,
) -> None:
    subprocess.run(["cp", "-a", f"{pipeline}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    damage()

    mend_dvc.main()

    output = capsys.readouterr().out
    assert output.startswith(f"mend_dvc: removed {path}")
    assert output.endswith(", which was half-written\n")
    reproduce()
    assert Path("copy").read_text() == "text"


def test_dvc_itself_does_not_recover(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for mend_dvc. If this test fails, DVC repairs itself and mend_dvc can be deleted."""
    subprocess.run(["cp", "-a", f"{pipeline}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    empty_rwlock()

    with pytest.raises(DvcException):
        reproduce()


def test_valid_files_do_not_change(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pipeline)
    files = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}

    mend_dvc.main()

    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()} == files


def test_each_cut_of_a_lock_that_dvc_refuses_is_found(tmp_path: Path) -> None:
    """Also a cut after whole lines, which is YAML."""
    complete = (REPOSITORY / "dvc.lock").read_text(encoding="utf-8")
    (tmp_path / ".dvc").mkdir()
    lines = complete.splitlines(keepends=True)
    num_found = 0
    for count in range(0, len(lines), 7):
        (tmp_path / "dvc.lock").write_text("".join(lines[:count]), encoding="utf-8")
        is_damaged = mend_dvc.damaged_paths(tmp_path) == [tmp_path / "dvc.lock"]
        num_found += is_damaged
        if not is_damaged:
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe", pure=True).load("".join(lines[:count])))
    assert num_found > 5
    (tmp_path / "dvc.lock").write_text(complete, encoding="utf-8")
    assert mend_dvc.damaged_paths(tmp_path) == []


def test_nothing_is_removed_while_dvc_runs(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pipeline)
    monkeypatch.setattr(mend_dvc, "damaged_paths", lambda root: [root / "dvc.lock"])
    dvc_that_waits = tmp_path / "dvc"
    dvc_that_waits.write_text("import time; print('up', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, str(dvc_that_waits)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with pytest.raises(SystemExit) as raised:
                mend_dvc.main()
        finally:
            process.kill()
    assert raised.value.code == (
        f"error: dvc.lock is damaged and dvc runs as process {process.pid}. Wait until it ends, or end it."
    )


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts `dvc exp run --temp` and waits until its stage runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "somebody")
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert dvc("init", "--quiet").returncode == 0
    started = tmp_path / "started"
    Path("dvc.yaml").write_text(f"stages: {{wait: {{cmd: touch {started} && sleep 60, outs: [copy]}}}}")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "pipeline"], check=True)
    command = [*DVC, "exp", "run", "--temp", "--name", "slow"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            while not started.exists():
                assert run.poll() is None
                time.sleep(0.1)
            yield run
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def test_killed_experiment_gets_the_state_failed(
    experiment: "subprocess.Popen[bytes]", capsys: pytest.CaptureFixture[str]
) -> None:
    mend_dvc.main()
    assert capsys.readouterr().out == ""  # dvc and its stage run

    experiment.kill()
    experiment.wait()
    mend_dvc.main()
    assert capsys.readouterr().out == ""  # the stage still runs

    os.killpg(experiment.pid, signal.SIGKILL)
    assert "Running" in dvc("exp", "show", "--no-pager", "--csv").stdout  # the reason for this repair
    output = ""
    until = time.monotonic() + 10
    while not output and time.monotonic() < until:  # the killed processes take a moment to disappear
        mend_dvc.main()
        output = capsys.readouterr().out

    (copy,) = Path(".dvc/tmp/exps/standalone").resolve().glob("tmp*")
    assert output == (
        f"mend_dvc: experiment slow was killed; its state is now failed. You can delete its copy: rm -r {copy}\n"
    )
    assert "Running" not in dvc("exp", "show", "--no-pager", "--csv").stdout
    mend_dvc.main()
    assert capsys.readouterr().out == ""


def test_folder_without_dvc_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        mend_dvc.main()
    assert raised.value.code == f"error: {tmp_path} has no folder .dvc. Run from the folder that holds dvc.yaml."
