"""generate on a tiny model."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY
from tiny_llama import quiet

from commands import generate

pytestmark = quiet
PROMPTS = ["It cost $5 in $HOME", "a $(shell id) b", "one\ntwo", 'it\'s "q" (x) `id` \\ $$']


@pytest.fixture
def run(tmp_path, monkeypatch, write_params, models, capsys):
    """Runs generate: run("--prompts", "file", PROMPT="...", stdin="...")."""
    monkeypatch.chdir(tmp_path)
    write_params({"sample.max_new_tokens": 8})
    shutil.copytree(models, tmp_path / "models")

    def start(*arguments, stdin="", **environment):
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        generate.main()
        return capsys.readouterr().out

    return start


def test_both_models_continue_the_prompt(run):
    base, adapted = run(PROMPT="The sea").split("--- adapted ---\n")

    assert base.startswith("--- base ---\nThe sea")
    assert adapted.startswith("The sea")
    assert base.removeprefix("--- base ---\n") != adapted


def test_reads_one_prompt_from_standard_input(run):
    assert run(stdin="one\ntwo\n").startswith("--- base ---\none\ntwo")


def test_reads_prompts_from_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("The sea\n\nRivers $x\n")

    printed = run("--prompts", "prompts.txt")

    assert printed.count("--- base ---") == printed.count("--- adapted ---") == 2
    assert "--- base ---\nRivers $x" in printed


def test_prompts_of_a_windows_program(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfThe sea\r\nRivers\xe2\x80\xa8and ice\r\n")

    assert generate.read_prompts(tmp_path / "prompts.txt") == ["The sea", "Rivers\u2028and ice"]


def test_a_prompt_that_is_not_utf8_is_refused(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("Stra\xdfe".encode("latin-1"))

    with pytest.raises(SystemExit, match=r"prompts\.txt: not UTF-8 .*Convert it"):
        run("--prompts", "prompts.txt")


def test_a_prompt_of_the_environment_that_is_not_utf8_is_refused(run):
    with pytest.raises(SystemExit, match=r"the prompt: not UTF-8 .*Convert it"):
        run(PROMPT=os.fsdecode("Stra\xdfe".encode("latin-1")))


def test_an_empty_prompt_is_refused(run):
    with pytest.raises(SystemExit, match="The prompt is empty"):
        run()


def test_missing_models_are_named(run):
    shutil.rmtree("models/base")

    with pytest.raises(SystemExit, match="models/base does not exist"):
        run(PROMPT="The sea")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("from_environment", [True, False])
def test_make_does_not_expand_the_prompt(tmp_path, prompt, from_environment):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    printed = "@printenv PROMPT"
    (tmp_path / "Makefile").write_text(makefile.replace("@python -m commands.generate", printed))
    arguments = [] if from_environment else [f"PROMPT={prompt}"]
    environment = os.environ | ({"PROMPT": prompt} if from_environment else {})
    for name in ("requirements.txt", "requirements.lock"):
        (tmp_path / name).touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()

    process = subprocess.run(
        ["make", "--no-print-directory", "--old-file=.venv/.installed", "generate", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert process.stdout == f"{prompt}\n", process.stderr
