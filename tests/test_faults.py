"""Faults of the machine: a full disk, a file size limit, a flipped bit, a read-only folder, a killed worker."""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import dvclive.live  # noqa: F401  # train imports it; forks of this process need not
import psutil
import pytest
from forked import run_forked
from helpers import REPOSITORY, prose, wait_until
from tiny_llama import TINY_SETTINGS, write_split
from tiny_pdfs import extract_files, hanging_pdf, write_pdf

from pdf2lora.documents.language import detect_language
from pdf2lora.documents.records import Extraction, Reason, read_documents
from pdf2lora.documents.sources import Source
from pdf2lora.documents.worker import Worker
from pdf2lora.errors import report_input_errors
from pdf2lora.runtime.manifest import MANIFEST
from stages import evaluate, train
from stages import extract as extract_stage

SETTINGS = {
    **TINY_SETTINGS,
    "evaluate.stride": 16,
    "corpus": "reports",
    "extract.min_characters": 50,
}
EXTRACT: dict[str, Any] = {"engines": ["pypdf2"], "min_characters": 10}


def run_extract(*, largest_file: int = resource.RLIM_INFINITY) -> Any:
    """Runs extract in this process. largest_file: size limit of a file in bytes. Returns the argument of sys.exit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        extract_stage.main()
    except SystemExit as ended:
        return ended.code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


def run_train(*, largest_file: int = resource.RLIM_INFINITY) -> Any:
    """Runs train in a fork of this process, as run_extract does."""

    def work(processes: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                train.main()
            except SystemExit as ended:
                return ended.code
        return None

    return run_forked(1, work)[0]


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_params: Callable[..., Path], one_core: None) -> Path:
    """A project with a corpus of three PDFs."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_STAGE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    write_params(SETTINGS)
    detect_language("the sea")  # loads a model; forks of this process need not
    for number in range(3):
        write_pdf(tmp_path / f"data/pdfs/reports/{number}.pdf", [prose(number), prose(10 + number)])
    return tmp_path


@pytest.fixture
def with_base(project: Path, base: Path) -> Path:
    """The project, ready for train."""
    for split in ("train", "validation", "test"):
        write_split(project, split, [prose(3, 25)], base)
    write_split(project, "replay", [], base)
    shutil.copytree(base, project / "models/base")
    (project / "metrics").mkdir()
    (project / "metrics/batch.json").write_text(
        '{"device": "cpu", "memory_gib": "auto", "placement": "gpu", "gradient_checkpointing": "full", '
        '"per_device_batch": 2, "gradient_accumulation_steps": 1, "effective_batch": 2}'
    )
    return project


@pytest.fixture
def small_disk(project: Path) -> Iterator[Path]:
    """The project with a data folder of 64 kB."""
    data = project / "data"
    shutil.move(data, project / "aside")
    data.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", data], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    shutil.copytree(project / "aside", data, dirs_exist_ok=True)
    yield data
    subprocess.run(["umount", "--lazy", data], check=True)


# a full disk


def test_full_disk_is_reported_and_the_old_output_stays(small_disk: Path, write_params: Callable[..., Path]) -> None:
    assert run_extract() is None
    before = Path("data/documents.jsonl").read_bytes()
    write_params(SETTINGS | {"extract.max_pages": 1})
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))

    message = run_extract()

    assert message == (
        "error: data/documents.jsonl: No space left on device. Free space on that disk, then run again. "
        "Finished work is kept."
    )
    assert Path("data/documents.jsonl").read_bytes() == before
    assert not list(small_disk.glob(".*"))
    filler.unlink()
    assert run_extract() is None
    assert [document.pages_read for document in read_documents(Path("data/documents.jsonl"))] == [1] * 3


def test_file_size_limit_is_reported(project: Path) -> None:
    message = run_extract(largest_file=700)

    assert re.fullmatch(
        r"error: \S+: File too large\. Raise the limit on file sizes \(ulimit -f\), then run again\. "
        r"Finished work is kept\.",
        message,
    )
    assert not Path("data/documents.jsonl").exists()
    assert not list(project.rglob("*.partial"))
    assert run_extract() is None


@pytest.mark.usefixtures("with_base")
def test_training_resumes_after_a_checkpoint_did_not_fit() -> None:
    message = run_train(largest_file=20_000)  # less than the adapter

    assert message.startswith("error: ")
    assert message.endswith(", then run again. Finished work is kept.")
    assert not Path("models/adapter").exists()

    assert run_train() is None
    assert Path("models/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "data/out"), "data/out: No space left on device. Free space on that"),
        (OSError(122, "Disk quota exceeded"), "a file: Disk quota exceeded. Free space in your quota"),
        (PermissionError(13, "Permission denied", "data"), "data: Permission denied. Check the file's permissions"),
        (OSError(30, "Read-only file system", "data"), "data: Read-only file system. Make the file system writable"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "a file: No space left on device. Free"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"),
            "a checkpoint file is incomplete. Free",
        ),
    ],
)
def test_system_error_is_reported_in_one_line(error: Exception, message: str) -> None:
    @report_input_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith(f"error: {message}")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("shapes differ"), KeyError("loss")])
def test_other_exceptions_keep_their_traceback(error: Exception) -> None:
    @report_input_errors
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        main()


# a read-only folder


def test_read_only_folder_is_reported(project: Path) -> None:
    data = project / "data"
    if os.geteuid() == 0:  # permissions do not stop root; a read-only mount does
        if subprocess.run(["mount", "--bind", data, data], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        subprocess.run(["mount", "-o", "remount,bind,ro", data], check=True)
    else:
        data.chmod(0o500)
    try:
        message = run_extract()
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", data], check=True)
        else:
            data.chmod(0o700)

    assert message.startswith("error: data/.documents.jsonl.")
    assert message.endswith("then run again. Finished work is kept.")
    assert run_extract() is None


def test_ctrl_c_ends_extract_at_once_and_keeps_finished_documents(project: Path) -> None:
    """The terminal sends SIGINT to the whole group. One PDF makes an engine hang."""
    (project / "data/pdfs/reports/hangs.pdf").write_bytes(hanging_pdf(prose(5)))
    stage = subprocess.Popen(
        [sys.executable, "-c", "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
         "from stages import extract\nif __name__ == '__main__': extract.main()"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    with stage:
        wait_until(lambda: len(list(Path(".scratch/extract").glob("*/*.json"))) == 3)
        started = psutil.Process(stage.pid).children(recursive=True)
        os.killpg(stage.pid, signal.SIGINT)
        assert stage.communicate(timeout=15)[1] == "stopped by Ctrl-C. Finished work is kept.\n"
    assert stage.returncode == 1
    assert not psutil.wait_procs(started, timeout=15)[1]
    assert not Path("data/documents.jsonl").exists()


# files that change


def test_pdf_that_changes_while_it_is_read_is_an_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Path("data/pdfs/reports/1.pdf")
    whole = cut.read_bytes()
    extract_all = extract_stage.extract

    def extract_while_cut(*arguments: Any) -> Iterator[tuple[Source, Extraction]]:
        cut.write_bytes(whole[: len(whole) // 2])
        yield from extract_all(*arguments)

    monkeypatch.setattr(extract_stage, "extract", extract_while_cut)
    with pytest.raises(SystemExit) as ended:
        extract_stage.main()
    assert ended.value.code == (
        "error: data/pdfs/reports/1.pdf changed during the extraction. Run again when no program writes to it."
    )

    cut.write_bytes(whole)
    monkeypatch.setattr(extract_stage, "extract", extract_all)
    extract_stage.main()

    assert [document.reason for document in read_documents(Path("data/documents.jsonl"))] == [None] * 3


def test_killed_worker_changes_no_text(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 or the out-of-memory killer, the document is read once more."""
    files = sorted(Path("data/pdfs/reports").iterdir())
    undisturbed = extract_files(files, **EXTRACT)
    processor_time_s = Worker._processor_time_s
    pids: list[int] = []

    def kill_once(worker: Worker) -> float:
        pids.append(worker.process.pid)
        if len(pids) == 1:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        return processor_time_s(worker)

    monkeypatch.setattr(Worker, "_processor_time_s", kill_once)
    assert extract_files(files, **EXTRACT) == undisturbed
    assert len(set(pids)) == 2


def test_pdf_that_kills_its_worker_twice_has_crashed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []

    def kill(worker: Worker) -> float:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        killed.append(worker.process.pid)
        raise EOFError

    monkeypatch.setattr(Worker, "_processor_time_s", kill)
    [(_, extraction)] = extract_files([Path("data/pdfs/reports/0.pdf")], **EXTRACT)
    assert extraction.reason == Reason.CRASHED
    assert len(killed) == 2


@pytest.mark.parametrize("stage", [train, evaluate])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_flipped_bit_in_the_base_is_found(with_base: Path, stage: Any, name: str) -> None:
    """The file's times do not change, as with a disk error, so DVC does not hash the file."""
    Path("models/adapter").mkdir()
    file = Path("models/base") / name
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(SystemExit) as ended:
        stage.main()

    assert ended.value.code == (
        f"error: models/base cannot be used: {name} is corrupt (SHA-256 mismatch). "
        "Make it again with: dvc repro --force convert"
    )


def test_base_without_a_manifest_is_incomplete(with_base: Path) -> None:
    Path("models/adapter").mkdir()
    (with_base / "models/base" / MANIFEST).unlink()

    with pytest.raises(SystemExit) as ended:
        evaluate.main()

    assert ended.value.code == (
        "error: models/base cannot be used: it is incomplete (no manifest.json). "
        "Make it again with: dvc repro --force convert"
    )


# missing packages


def test_missing_library_is_reported(project: Path) -> None:
    assert run_extract() is None

    ended = run_python(
        "import sys, runpy; sys.modules['numpy'] = None; runpy.run_module('stages.split', run_name='__main__')"
    )

    assert ended.returncode == 1
    assert ended.stderr == "error: numpy is not installed. Run make setup, or pip install -r requirements.txt\n"


def test_missing_module_of_this_project_keeps_its_traceback() -> None:
    assert "Traceback" in run_python("import stages, pdf2lora.nowhere").stderr
