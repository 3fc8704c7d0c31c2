"""--help and unknown arguments of the commands."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

COMMANDS = sorted(file.stem for file in Path(REPOSITORY, "commands").glob("*.py"))
COMMANDS = [name for name in COMMANDS if name not in ("__init__", "arguments")]


def run(command: str, argument: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In an empty folder, where a command that runs would fail."""
    code = f"import sys, runpy; sys.path.insert(0, {str(REPOSITORY)!r}); sys.argv = ['', {argument!r}]; "
    code += f"runpy.run_module('commands.{command}', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_prints_the_docstring_and_runs_nothing(command: str, tmp_path: Path) -> None:
    process = run(command, "--help", tmp_path)

    docstring = (REPOSITORY / f"commands/{command}.py").read_text(encoding="utf-8").split('"""')[1]
    assert process.returncode == 0
    assert docstring.strip() in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    process = run("doctor", "--verbose", tmp_path)

    assert process.returncode == 2
    assert "unrecognized arguments: --verbose" in process.stderr
