"""The check of tests/long/same_bytes.py. Its short form is in test_torture.py, the long one is `make same-bytes`."""

from pathlib import Path

import pytest

from pdf2lora.runtime import parallel
from tests.long.clones import Failed
from tests.long.same_bytes import require_same


def write_lock(clone: Path, md5: str, wdir: str = ".") -> Path:
    clone.mkdir()
    outs = f"[{{path: x, md5: '1'}}, {{path: y, md5: '{md5}'}}]"
    (clone / "dvc.lock").write_text(f"schema: '2.0'\nstages: {{a: {{cmd: 'cd {wdir}', outs: {outs}}}}}\n")
    return clone


def test_different_output_is_found(tmp_path: Path) -> None:
    one, same, other, elsewhere = (
        write_lock(tmp_path / "one", "1"),
        write_lock(tmp_path / "same", "1"),
        write_lock(tmp_path / "other", "2"),
        write_lock(tmp_path / "elsewhere", "1", wdir=".."),
    )
    assert require_same(one, same) == 2
    with pytest.raises(Failed, match="different bytes in y"):
        require_same(one, other)
    with pytest.raises(Failed, match="all outputs are the same, but dvc"):
        require_same(one, elsewhere)


def test_number_of_workers_is_the_number_of_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 64)
    assert parallel.num_cores() == 2
