"""Stages and commands without the outputs of the stages before them."""

import importlib
from pathlib import Path

import pytest

from commands import generate
from pdf2lora.errors import InputError
from pdf2lora.runtime.inputs import require_inputs, require_inputs_of
from pdf2lora.runtime.scratch import pipeline_stages


@pytest.fixture
def empty(tmp_path, monkeypatch, write_params):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    write_params({"compute.num_processes": 1})
    for folder in ("data/pdfs/demo", "models/source/demo"):
        (tmp_path / folder).mkdir(parents=True)


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("stage", pipeline_stages())
def test_a_stage_without_inputs_ends_with_one_line(stage):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"stages.{stage}").main()

    message = ended.value.code
    assert message.startswith("error: ")
    assert "\n" not in message


@pytest.mark.usefixtures("empty")
def test_the_line_names_the_file_and_the_command_that_makes_it(monkeypatch):
    def message(stage):
        with pytest.raises(InputError) as caught:
            require_inputs_of(stage)
        return str(caught.value)

    assert message("split") == "data/documents.jsonl does not exist. Make it with: dvc repro extract"
    assert message("evaluate").endswith("Make it with: dvc repro split")
    Path("data/split").mkdir()
    for name in ("test.jsonl", "test_groups.json"):
        Path("data/split", name).touch()
    assert message("evaluate") == "data/tokens/test.npy does not exist. Make it with: dvc repro tokenize"
    monkeypatch.setenv("PROMPT", "The sea")
    monkeypatch.setattr("sys.argv", ["generate"])
    with pytest.raises(SystemExit, match=r"models/base does not exist\. Make it with: dvc repro convert"):
        generate.main()


@pytest.mark.usefixtures("empty")
def test_existing_inputs_are_fine():
    require_inputs(Path("params.yaml"))
