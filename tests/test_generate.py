"""generate on a tiny model."""

import shutil
import sys

import pytest
from tiny_adapter import write_tiny_models
from tiny_llama import quiet

from commands import generate

pytestmark = quiet


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def project(tmp_path, monkeypatch, write_params, models):
    monkeypatch.chdir(tmp_path)
    write_params({"sample.max_new_tokens": 8})
    shutil.copytree(models, tmp_path / "models")
    return tmp_path


def test_both_models_continue_the_prompt(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "The", "sea"])

    generate.main()

    printed = capsys.readouterr().out
    base, adapted = printed.split("--- adapted ---\n")
    assert base.startswith("--- base ---\nThe sea")
    assert adapted.startswith("The sea")
    assert base.removeprefix("--- base ---\n") != adapted


def test_needs_a_prompt(project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", ""])

    with pytest.raises(SystemExit, match="PROMPT is empty"):
        generate.main()


def test_needs_models(project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", "The sea"])
    shutil.rmtree("models/base")

    with pytest.raises(SystemExit, match="models/base does not exist"):
        generate.main()
