import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from pdf2lora.runtime.files import atomic_directory, atomic_write, file_sha256, write_json


def test_file_sha256_is_the_hash_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_atomic_write_replaces_the_file_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.jsonl"
    with atomic_write(file) as partial:
        partial.write_text("done")
        assert not file.exists()
    assert file.read_text() == "done"
    assert os.listdir(file.parent) == ["out.jsonl"]


def test_atomic_directory_replaces_the_folder_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "split"
    for name in ("old", "new"):
        with atomic_directory(folder) as partial:
            (partial / name).touch()
            assert not (folder / name).exists()
    assert os.listdir(folder) == ["new"]
    assert os.listdir(folder.parent) == ["split"]


def fail_in(block: AbstractContextManager[Path], write: Callable[[Path], object]) -> None:
    def write_and_fail() -> None:
        with block as partial:
            write(partial)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()


def test_atomic_directory_replaces_the_folder_behind_a_link(tmp_path: Path) -> None:
    """As a user does who has models/merged on a larger disk."""
    (tmp_path / "disk/merged").mkdir(parents=True)
    (tmp_path / "merged").symlink_to(tmp_path / "disk/merged")
    with atomic_directory(tmp_path / "merged") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "new").touch()
    assert (tmp_path / "merged").is_symlink()
    assert [path.name for path in (tmp_path / "disk/merged").iterdir()] == ["new"]


def test_atomic_write_keeps_the_old_file_after_an_exception(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    fail_in(atomic_write(file), lambda partial: partial.write_text("half"))
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_atomic_directory_keeps_the_old_folder_after_an_exception(tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "old").touch()
    fail_in(atomic_directory(folder), lambda partial: (partial / "half").touch())
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["split"]


def test_no_partial_output_stays_after_an_exception(tmp_path: Path) -> None:
    fail_in(atomic_write(tmp_path / "file"), lambda partial: partial.write_text("half"))
    fail_in(atomic_directory(tmp_path / "folder"), lambda partial: (partial / "half").touch())
    assert os.listdir(tmp_path) == []


def test_partial_files_of_dead_processes_are_removed_and_of_live_ones_kept(tmp_path: Path) -> None:
    with Popen(["sleep", "60"]) as live:
        zombie = Popen(["true"])  # a zombie, because this process does not wait for it
        while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        partials = {owner: tmp_path / f".file.{owner}.partial" for owner in (live.pid, zombie.pid, 2**22 + 1, "no-pid")}
        for path in partials.values():
            path.touch()

        with atomic_write(tmp_path / "file") as partial:
            partial.write_text("whole")

        live.kill()
    assert [owner for owner, path in partials.items() if path.exists()] == [live.pid]
    zombie.wait()


def test_atomic_directory_starts_empty_after_a_killed_run(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "split") as partial:
        partial_of_killed_run = partial
    partial_of_killed_run.mkdir()
    (partial_of_killed_run / "half").touch()
    with atomic_directory(tmp_path / "split") as partial:
        (partial / "train.jsonl").touch()
    assert os.listdir(tmp_path / "split") == ["train.jsonl"]


def test_write_json_writes_the_value_with_unicode_letters(tmp_path: Path) -> None:
    file = tmp_path / "metrics" / "eval.json"
    write_json(file, {"perplexity": 7.25, "corpus": "Klima für Käse"})
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == {"perplexity": 7.25, "corpus": "Klima für Käse"}
    assert "für Käse" in text
    assert text.endswith("}\n")
