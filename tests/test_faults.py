"""What the machine does to the pipeline: a full disk, a limit, a flipped byte, a folder that may not be written to."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, prose, write_pdf
from tiny_llama import COMPUTE, LORA, QUANTIZATION, TRAIN, write_texts, write_tiny_llama

from pdf2lora.documents import corpus as corpus_module
from pdf2lora.documents.extraction import extract
from pdf2lora.documents.records import Extraction, Reason, read_documents
from pdf2lora.documents.worker import Worker
from pdf2lora.errors import report_input_errors
from pdf2lora.runtime.manifest import MANIFEST
from stages import evaluate, sample, train
from stages import extract as extract_stage

SETTINGS = {
    **{f"train.{key}": value for key, value in TRAIN.model_dump().items()},
    **{f"compute.{key}": value for key, value in COMPUTE.model_dump().items()},
    **{f"lora.{key}": value for key, value in LORA.model_dump().items()},
    **{f"quantization.{key}": value for key, value in QUANTIZATION.model_dump().items()},
    "evaluate.stride": 16,
    "corpus": "reports",
    "extract.min_characters": 50,
}


def run_stage(name: str, *, largest_file: int = resource.RLIM_INFINITY) -> "subprocess.CompletedProcess[str]":
    """A stage as dvc runs it, in the current folder; largest_file: bytes that a file may have."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file}))"
    return run_python(f"{limit}; import runpy; runpy.run_module('stages.{name}', run_name='__main__')")


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_params: Callable[..., Path]) -> Path:
    """A corpus of three PDFs."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_STAGE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    write_params(SETTINGS)
    for number in range(3):
        write_pdf(tmp_path / f"data/pdfs/reports/{number}.pdf", [prose(number), prose(10 + number)])
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def with_base(project: Path, base: Path) -> Path:
    """A project before train."""
    for side in ("train", "validation", "test"):
        write_texts(project / f"data/split/{side}.jsonl", [prose(3, 25)])
    shutil.copytree(base, project / "models/base")
    (project / "metrics").mkdir()
    (project / "metrics/batch.json").write_text(
        '{"device": "cpu", "memory_gib": "auto", "gradient_checkpointing": "full", '
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


def test_a_full_disk_is_named_and_costs_nothing_that_was_there(
    small_disk: Path, write_params: Callable[..., Path]
) -> None:
    assert run_stage("extract").returncode == 0
    before = Path("data/documents.jsonl").read_bytes()
    write_params(SETTINGS | {"extract.max_pages": 1})
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))

    ended = run_stage("extract")

    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == (
        "error: data/documents.jsonl: No space left on device; make room on that disk, then run again: "
        "what is finished is kept"
    )
    assert Path("data/documents.jsonl").read_bytes() == before
    assert not list(small_disk.glob(".*"))
    filler.unlink()
    assert run_stage("extract").returncode == 0
    assert [document.pages_read for document in read_documents(Path("data/documents.jsonl"))] == [1] * 3


def test_a_limit_of_file_sizes_is_named(project: Path) -> None:
    ended = run_stage("extract", largest_file=700)

    assert ended.returncode == 1
    assert re.fullmatch(
        r"error: \S+: File too large; raise the limit of file sizes \(ulimit -f\), "
        "then run again: what is finished is kept",
        ended.stderr.strip().splitlines()[-1],
    )
    assert not Path("data/documents.jsonl").exists()
    assert not list(project.rglob("*.partial"))
    assert run_stage("extract").returncode == 0


@pytest.mark.usefixtures("with_base")
def test_a_training_whose_checkpoint_does_not_fit_goes_on_when_there_is_room() -> None:
    ended = run_stage("train", largest_file=20_000)  # less than the adapter

    assert ended.returncode == 1
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert said.endswith(", then run again: what is finished is kept")
    assert "Traceback" not in ended.stderr
    assert not Path("models/adapter").exists()

    again = run_stage("train")

    assert again.returncode == 0, again.stderr
    assert Path("models/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "data/out"), "data/out: No space left on device; make room on that"),
        (OSError(122, "Disk quota exceeded"), "a file: Disk quota exceeded; make room in your quota"),
        (PermissionError(13, "Permission denied", "data"), "data: Permission denied; give yourself the right to it"),
        (OSError(30, "Read-only file system", "data"), "data: Read-only file system; make it writable"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "a file: No space left on device; make"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), "a checkpoint could not be"),
    ],
)
def test_what_the_system_refuses_is_said_in_a_line(error: Exception, said: str) -> None:
    @report_input_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith(f"error: {said}")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("shapes differ"), KeyError("loss")])
def test_any_other_failure_keeps_its_traceback(error: Exception) -> None:
    @report_input_errors
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        main()


# a folder that may not be written to


def test_a_folder_that_may_not_be_written_to(project: Path) -> None:
    data = project / "data"
    if os.geteuid() == 0:  # root may write everywhere but to what is mounted read-only
        if subprocess.run(["mount", "--bind", data, data], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        subprocess.run(["mount", "-o", "remount,bind,ro", data], check=True)
    else:
        data.chmod(0o500)
    try:
        ended = run_stage("extract")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", data], check=True)
        else:
            data.chmod(0o700)

    assert ended.returncode == 1
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith("error: data/.documents.jsonl.")
    assert said.endswith("then run again: what is finished is kept")
    assert run_stage("extract").returncode == 0


# files that change


def test_a_pdf_that_is_cut_while_it_is_read_is_not_taken_for_whole(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Path("data/pdfs/reports/1.pdf")
    whole = cut.read_bytes()
    extract_all = corpus_module.extract

    def extract_while_cut(files: Any, **settings: Any) -> Iterator[tuple[Path, Extraction]]:
        cut.write_bytes(whole[: len(whole) // 2])
        yield from extract_all(files, **settings)

    monkeypatch.setattr(corpus_module, "extract", extract_while_cut)
    with pytest.raises(SystemExit) as ended:
        extract_stage.main()
    assert ended.value.code == (
        "error: data/pdfs/reports/1.pdf: changed while it was read; wait until its writer has finished, then run again"
    )

    cut.write_bytes(whole)
    monkeypatch.setattr(corpus_module, "extract", extract_all)
    extract_stage.main()

    assert [document.reason for document in read_documents(Path("data/documents.jsonl"))] == [None] * 3


def test_a_worker_that_the_machine_kills_changes_no_text(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran out of memory elsewhere, or kill -9: a document is read once more before it counts as a crash."""
    files = sorted(Path("data/pdfs/reports").iterdir())
    settings = {"engines": ["pypdf2"], "max_pages": 9, "timeout_s": 20, "memory_gib": 1.0, "min_characters": 10}
    undisturbed = list(extract(files, clean=True, num_workers=1, **settings))  # type: ignore[arg-type]
    seconds = Worker._processor_seconds
    asked: list[int] = []

    def kill_once(worker: Worker) -> float:
        asked.append(worker.process.pid)
        if len(asked) == 1:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        return seconds(worker)

    monkeypatch.setattr(Worker, "_processor_seconds", kill_once)
    assert list(extract(files, clean=True, num_workers=1, **settings)) == undisturbed  # type: ignore[arg-type]
    assert len(set(asked)) == 2


def test_a_pdf_that_kills_its_worker_each_time_has_crashed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []

    def kill(worker: Worker) -> float:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        killed.append(worker.process.pid)
        raise EOFError

    monkeypatch.setattr(Worker, "_processor_seconds", kill)
    settings = {"engines": ["pypdf2"], "max_pages": 9, "timeout_s": 20, "memory_gib": 1.0, "min_characters": 10}
    [(_, extraction)] = extract([Path("data/pdfs/reports/0.pdf")], clean=True, num_workers=1, **settings)  # type: ignore[arg-type]
    assert extraction.reason == Reason.CRASHED
    assert len(killed) == 2


@pytest.mark.parametrize("stage", [train, evaluate, sample])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_bit_in_the_base_is_found(with_base: Path, stage: Any, name: str) -> None:
    """With the times of the file as they were, as a disk does it: dvc would not look."""
    file = Path("models/base") / name
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(SystemExit) as ended:
        stage.main()

    assert ended.value.code == (
        f"error: models/base: cannot be used, its {name} is not what was written; "
        "make it again with: dvc repro --force convert"
    )


def test_a_base_without_its_manifest_was_not_written_to_its_end(with_base: Path) -> None:
    (with_base / "models/base" / MANIFEST).unlink()

    with pytest.raises(SystemExit) as ended:
        evaluate.main()

    assert ended.value.code == (
        "error: models/base: cannot be used, it was not written to its end; "
        "make it again with: dvc repro --force convert"
    )


# what is not installed


def test_a_library_that_is_missing_is_named(project: Path) -> None:
    assert run_stage("extract").returncode == 0

    ended = run_python(
        "import sys, runpy; sys.modules['datasketch'] = None; runpy.run_module('stages.split', run_name='__main__')"
    )

    assert ended.returncode == 1
    assert ended.stderr == "error: datasketch is not installed; run make setup, or pip install -r requirements.txt\n"


def test_a_module_of_ours_that_is_missing_keeps_its_traceback() -> None:
    assert "Traceback" in run_python("import stages, pdf2lora.nowhere").stderr
