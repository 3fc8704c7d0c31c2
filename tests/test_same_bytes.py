"""The short form of tests/long/same_bytes.py. The long form is `make same-bytes`."""

from pathlib import Path

import pytest

from pdf2lora.runtime import parallel
from tests.long import same_bytes
from tests.long.clones import Failed


def test_extract_split_and_convert_give_the_same_bytes_in_two_clones(tmp_path: Path) -> None:
    summary = same_bytes.compare(tmp_path, ["split", "convert"], short=True, seed=1)

    assert summary.startswith("same_bytes: dvc.lock is the same, ")


def test_different_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the runs by two lock files with one different output."""

    def make_clone(clone: Path, *, short: bool) -> None:
        for name in ("data/pdfs", "models/source"):
            (clone / name).mkdir(parents=True)

    def run(command: list[str], clone: Path, **settings: object) -> str:
        md5 = "1" if clone.name == "one" else "2"
        lock = f"schema: '2.0'\nstages: {{a: {{outs: [{{path: x, md5: '1'}}, {{path: y, md5: '{md5}'}}]}}}}\n"
        (clone / "dvc.lock").write_text(lock)
        return ""

    monkeypatch.setattr(same_bytes, "make_clone", make_clone)
    monkeypatch.setattr(same_bytes, "run", run)
    with pytest.raises(Failed, match="different bytes in y"):
        same_bytes.compare(tmp_path, ["split"], short=True, seed=1)


def test_number_of_workers_is_the_number_of_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 64)
    assert parallel.num_cores() == 2
