import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import atomic_directory, atomic_write, file_sha256, write_json
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.scratch import fingerprint, project_root, scratch_folder

OWNER = """
import sys, time
from pathlib import Path
from pdf2lora.runtime.locks import exclusive_lock

with exclusive_lock(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"\x00\x01")
    return folder


def test_fingerprint_is_16_hex_digits_and_the_same_for_the_same(folder: Path) -> None:
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


def test_fingerprint_knows_bytes_and_not_times(folder: Path) -> None:
    file = folder / "config.json"
    before = fingerprint(folder), fingerprint(file)
    os.utime(file, (1, 1))
    assert (fingerprint(folder), fingerprint(file)) == before
    file.write_text("[]")
    assert fingerprint(file) != before[1]


def test_fingerprint_does_not_depend_on_where_the_folder_lies(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder.rename(folder.with_name("moved"))) == before


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_project_root_is_where_dvc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert project_root() == Path(".")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert project_root() == tmp_path
    assert scratch_folder("train", "0123") == tmp_path / ".scratch" / "train" / "0123"
    assert (tmp_path / ".scratch" / "train" / "0123").is_dir()


def test_scratch_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (scratch_folder("train", "0123") / "checkpoint").touch()
    assert (scratch_folder("train", "0123") / "checkpoint").exists()


def test_whole_file_is_put_in_place_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.jsonl"
    with atomic_write(file) as partial:
        partial.write_text("done")
        assert not file.exists()
    assert file.read_text() == "done"
    assert os.listdir(file.parent) == ["out.jsonl"]


def test_whole_folder_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
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


def test_whole_file_leaves_the_old_content_when_the_block_raises(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    fail_in(atomic_write(file), lambda partial: partial.write_text("half"))
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_whole_folder_leaves_the_old_content_when_the_block_raises(tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "old").touch()
    fail_in(atomic_directory(folder), lambda partial: (partial / "half").touch())
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["split"]


def test_nothing_is_left_where_nothing_was(tmp_path: Path) -> None:
    fail_in(atomic_write(tmp_path / "file"), lambda partial: partial.write_text("half"))
    fail_in(atomic_directory(tmp_path / "folder"), lambda partial: (partial / "half").touch())
    assert os.listdir(tmp_path) == []


def test_what_ended_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    with Popen(["sleep", "60"]) as at_work:
        zombie = Popen(["true"])  # not waited for
        while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        left = {owner: tmp_path / f".file.{owner}.partial" for owner in (at_work.pid, zombie.pid, 2**22 + 1, "no-pid")}
        for path in left.values():
            path.touch()

        with atomic_write(tmp_path / "file") as partial:
            partial.write_text("whole")

        at_work.kill()
    assert [owner for owner, path in left.items() if path.exists()] == [at_work.pid]
    zombie.wait()


def test_whole_folder_starts_empty_after_a_killed_run(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "split") as partial:
        left_behind = partial
    left_behind.mkdir()
    (left_behind / "half").touch()
    with atomic_directory(tmp_path / "split") as partial:
        (partial / "train.jsonl").touch()
    assert os.listdir(tmp_path / "split") == ["train.jsonl"]


def test_write_json_gives_the_value_and_its_letters(tmp_path: Path) -> None:
    file = tmp_path / "metrics" / "eval.json"
    write_json(file, {"perplexity": 7.25, "corpus": "Klima für Käse"})
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == {"perplexity": 7.25, "corpus": "Klima für Käse"}
    assert "für Käse" in text
    assert text.endswith("}\n")


def start_owner(start_python: Callable[..., Popen[str]], folder: Path) -> Popen[str]:
    owner = start_python(OWNER, folder)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "owned\n"
    return owner


def test_a_second_process_is_kept_out(start_python: Callable[..., Popen[str]], tmp_path: Path) -> None:
    owner = start_owner(start_python, tmp_path)
    with pytest.raises(InputError) as refused, exclusive_lock(tmp_path):
        pytest.fail("both processes own the folder")
    assert str(refused.value) == (
        f"{tmp_path}: process {owner.pid} is already at work on these very settings and data; wait for it or end it"
    )


def test_a_killed_owner_lets_go(start_python: Callable[..., Popen[str]], tmp_path: Path) -> None:
    owner = start_owner(start_python, tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with exclusive_lock(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_an_owner_lets_go_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), exclusive_lock(tmp_path):
        raise RuntimeError("out of memory")
    for _ in range(2):
        with exclusive_lock(tmp_path):
            assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_other_folders_have_other_owners(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with exclusive_lock(tmp_path / "a"), exclusive_lock(tmp_path / "b"):
        assert (tmp_path / "b" / "lock").read_text() == str(os.getpid())
