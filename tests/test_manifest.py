import json
from pathlib import Path

import pytest

from pdf2lora.errors import InputError
from pdf2lora.runtime import manifest
from pdf2lora.runtime.manifest import MANIFEST, find_damage, require_intact, start_check, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub/weights").write_bytes(b"abc")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_has_hashes(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files.keys() == {"config.json", "sub/weights"}
    assert files["sub/weights"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert find_damage(folder) is None


def test_changed_file_is_corrupt(folder: Path) -> None:
    (folder / "sub/weights").write_bytes(b"abd")
    assert find_damage(folder) == "sub/weights is corrupt (SHA-256 mismatch)"


def test_folder_without_a_manifest_is_incomplete(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == "it is incomplete (no manifest.json)"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": ["config.json"]}', '{"files": {"config.json": 1}}']
)
def test_damaged_manifest_is_found(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert find_damage(folder) is not None


def test_missing_file_is_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot be used: it cannot be read .* dvc repro --force convert"):
        require_intact(folder, made_by="convert")


def test_check_in_a_thread_raises_where_its_result_is_needed(folder: Path) -> None:
    start_check(folder, made_by="convert")()
    (folder / "config.json").unlink()
    wait = start_check(folder, made_by="convert")
    with pytest.raises(InputError, match=r"dvc repro --force convert"):
        wait()


@pytest.mark.parametrize(("large_bytes", "num_threads"), [(2**20, 0), (1, 1)])
def test_small_files_are_hashed_without_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int, num_threads: int
) -> None:
    started = []

    class CountingPool(manifest.ThreadPoolExecutor):
        def __enter__(self) -> "CountingPool":
            started.append(self)
            return self

    monkeypatch.setattr(manifest, "ThreadPoolExecutor", CountingPool)
    monkeypatch.setattr(manifest, "LARGE_BYTES", large_bytes)
    assert find_damage(folder) is None
    assert len(started) == num_threads
