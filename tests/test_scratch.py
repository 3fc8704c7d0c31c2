import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pdf2lora.runtime.scratch import fingerprint, project_root, scratch_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"\x00\x01")
    return folder


def test_fingerprint_is_16_hex_digits_and_stable(folder: Path) -> None:
    assert fingerprint({"r": 8}, folder) == fingerprint({"r": 8}, folder)
    assert len(fingerprint(1)) == 16
    assert int(fingerprint(1), 16) >= 0


@pytest.mark.parametrize("other", [(8, "b"), (8,), ("8", "a"), ("a", 8), (8.0, "a"), (8, "a", None)])
def test_fingerprint_changes_with_the_values(other: tuple[object, ...]) -> None:
    assert fingerprint(*other) != fingerprint(8, "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("{ }"),
        lambda folder: (folder / "sub" / "weights").write_bytes(b"\x00\x02"),
        lambda folder: (folder / "sub" / "new").touch(),
        lambda folder: (folder / "sub" / "weights").unlink(),
        lambda folder: (folder / "config.json").rename(folder / "other.json"),
    ],
    ids=["bytes", "bytes_of_sub_folder", "added", "removed", "renamed"],
)
def test_fingerprint_changes_with_the_files_of_a_folder(folder: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_fingerprint_depends_on_bytes_and_not_on_times(folder: Path) -> None:
    file = folder / "config.json"
    before = fingerprint(folder), fingerprint(file)
    os.utime(file, (1, 1))
    assert (fingerprint(folder), fingerprint(file)) == before
    file.write_text("[]")
    assert fingerprint(file) != before[1]


def test_fingerprint_does_not_depend_on_the_path_of_the_folder(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder.rename(folder.with_name("moved"))) == before


def test_project_root_is_dvc_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert project_root() == Path(".")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert project_root() == tmp_path
    assert scratch_folder("train", "0123") == tmp_path / ".scratch" / "train" / "0123"
    assert (tmp_path / ".scratch" / "train" / "0123").is_dir()


def test_scratch_folder_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (scratch_folder("train", "0123") / "checkpoint").touch()
    assert (scratch_folder("train", "0123") / "checkpoint").exists()
