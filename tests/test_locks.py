import os
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from pdf2lora.errors import InputError
from pdf2lora.runtime.locks import exclusive_lock

OWNER = """
import sys, time
from pathlib import Path
from pdf2lora.runtime.locks import exclusive_lock

with exclusive_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def start_owner(start_python: Callable[..., Popen[str]], folder: Path) -> Popen[str]:
    owner = start_python(OWNER, folder)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "locked\n"
    return owner


def test_second_process_cannot_take_the_lock(start_python: Callable[..., Popen[str]], tmp_path: Path) -> None:
    owner = start_owner(start_python, tmp_path)
    with pytest.raises(InputError) as raised, exclusive_lock(tmp_path):
        pytest.fail("both processes have the lock")
    assert str(raised.value) == (f"{tmp_path} is locked by process {owner.pid}. Wait until it ends, or end it.")


def test_lock_of_a_killed_owner_is_free(start_python: Callable[..., Popen[str]], tmp_path: Path) -> None:
    owner = start_owner(start_python, tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with exclusive_lock(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_lock_is_free_after_the_block_and_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), exclusive_lock(tmp_path):
        raise RuntimeError("out of memory")
    for _ in range(2):
        with exclusive_lock(tmp_path):
            assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_locks_of_two_folders_are_independent(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with exclusive_lock(tmp_path / "a"), exclusive_lock(tmp_path / "b"):
        assert (tmp_path / "b" / "lock").read_text() == str(os.getpid())
