"""--help and unknown arguments of the commands."""

import runpy
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

COMMANDS = sorted(file.stem for file in Path(REPOSITORY, "commands").glob("*.py"))
COMMANDS = [name for name in COMMANDS if name not in ("__init__", "arguments")]


def run(command: str, argument: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """The exit status, in an empty folder, where a command that runs would fail."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [command, argument])
    monkeypatch.delitem(sys.modules, f"commands.{command}", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"commands.{command}", run_name="__main__")
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_prints_the_docstring_and_runs_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help", monkeypatch, tmp_path) == 0

    docstring = (REPOSITORY / f"commands/{command}.py").read_text(encoding="utf-8").split('"""')[1]
    assert docstring.strip() in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_argument_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--verbose", monkeypatch, tmp_path) == 2

    assert "unrecognized arguments: --verbose" in capsys.readouterr().err
