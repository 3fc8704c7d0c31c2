"""--help and unknown arguments of stages and commands."""

import runpy
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

PROGRAMS = [
    f"{folder}.{file.stem}"
    for folder in ("stages", "commands")
    for file in sorted(Path(REPOSITORY, folder).glob("*.py"))
    if file.stem != "__init__"
]


def run(program: str, argument: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """The exit status, in an empty folder, where a program that runs would fail."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [program, argument])
    monkeypatch.delitem(sys.modules, program, raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_prints_the_docstring_and_runs_nothing(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(program, "--help", monkeypatch, tmp_path) == 0

    file = REPOSITORY / f"{program.replace('.', '/')}.py"
    docstring = file.read_text(encoding="utf-8").split('"""')[1]
    assert docstring.strip() in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["commands.doctor", "stages.train"])
def test_an_unknown_argument_is_refused(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(program, "--verbose", monkeypatch, tmp_path) == 2

    assert "unrecognized arguments: --verbose" in capsys.readouterr().err
