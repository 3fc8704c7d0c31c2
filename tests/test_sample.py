"""sample: continuations of both models and the nats of prompt and reference."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import prose
from tiny_adapter import write_tiny_models
from tiny_llama import quiet, write_texts

from stages import sample

pytestmark = quiet
SETTINGS = {
    "quantization.bits": 16,
    "sample.num_documents": 2,
    "sample.prompt_tokens": 10,
    "sample.max_new_tokens": 12,
    "sample.temperature": 1.0,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def project(tmp_path, monkeypatch, write_params, models):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    write_texts(tmp_path / "data/split/test.jsonl", ["Glaciers € " + prose(1), "Tiny.", prose(3)])

    def run(**changes):
        write_params(SETTINGS | {f"sample.{name}": value for name, value in changes.items()})
        sample.main()
        return json.loads((tmp_path / "data/samples.json").read_text(encoding="utf-8"))

    return SimpleNamespace(run=run, folder=tmp_path)


def test_a_sample_has_prompt_reference_and_both_continuations(project):
    first, second = project.run()

    assert (first["document"], second["document"]) == ("test-0.pdf", "test-1.pdf")
    assert first["prompt"] == "Glaciers €"  # the 10th byte is the first of three: the character stays whole
    assert first["base"] != first["adapted"]
    assert first["prompt"] + first["truth"] == "".join(token["text"] for token in first["tokens"])
    assert ("Glaciers € " + prose(1)).startswith(first["prompt"] + first["truth"])


def test_a_document_can_be_shorter_than_the_prompt(project):
    _, tiny = project.run()

    assert (tiny["prompt"], tiny["truth"]) == ("Tiny.", "")
    assert len(tiny["tokens"]) == 5
    assert tiny["adapted"]


def test_the_seed_decides_the_continuations(project):
    first = project.run()

    assert project.run() == first
    assert project.run(seed=1)[0]["base"] != first[0]["base"]


def test_each_token_has_the_nats_of_both_models(project):
    tokens = project.run()[0]["tokens"]

    assert len(tokens) == 22
    assert all(token["base_nats"] > 0 and token["adapted_nats"] > 0 for token in tokens)
    assert any(abs(token["base_nats"] - token["adapted_nats"]) > 0.01 for token in tokens)


def test_more_tokens_than_the_context_are_refused(project):
    with pytest.raises(SystemExit) as stopped:
        project.run(max_new_tokens=200)

    assert "sample.max_new_tokens is 210; the base model's context is 128 tokens" in str(stopped.value)
