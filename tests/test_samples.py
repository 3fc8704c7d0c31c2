"""data/samples.json: continuations of both models and the nats of prompt and reference."""

import pytest
from helpers import make_document, prose
from tiny_adapter import write_tiny_models
from tiny_llama import COMPUTE, QUANTIZATION, changed, quiet

from pdf2lora.evaluation.samples import continue_openings, read_openings, sample_entries
from pdf2lora.model.forward import build_forward
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder

pytestmark = quiet
TEXTS = ["Glaciers € " + prose(1), "Tiny."]
SETTINGS = Sample(num_documents=2, prompt_tokens=10, max_new_tokens=12, temperature=1.0, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_models(tmp_path_factory.mktemp("models"))
    base = load_base(folder / "base", changed(QUANTIZATION, bits=16), COMPUTE)
    return build_forward(load_adapter(base, folder / "adapter"), "reference"), Encoder.load(folder / "base")


def sample(model, settings=SETTINGS):
    documents = [make_document(f"{number}.pdf", text) for number, text in enumerate(TEXTS)]
    forward, encoder = model
    openings = read_openings(documents, encoder, settings)
    with forward.model.disable_adapter():
        base_texts = continue_openings(forward, openings, encoder, settings)
    return sample_entries(openings, base_texts, continue_openings(forward, openings, encoder, settings))


def test_a_sample_has_prompt_reference_and_both_continuations(model):
    first, second = sample(model)

    assert (first["document"], second["document"]) == ("0.pdf", "1.pdf")
    assert first["prompt"] == "Glaciers €"  # the 10th byte is the first of three: the character stays whole
    assert first["base"] != first["adapted"]
    assert first["prompt"] + first["truth"] == "".join(token["text"] for token in first["tokens"])
    assert TEXTS[0].startswith(first["prompt"] + first["truth"])


def test_a_document_can_be_shorter_than_the_prompt(model):
    _, tiny = sample(model)

    assert (tiny["prompt"], tiny["truth"]) == ("Tiny.", "")
    assert len(tiny["tokens"]) == 5
    assert tiny["adapted"]


def test_the_seed_decides_the_continuations(model):
    first = sample(model)

    assert sample(model) == first
    assert sample(model, changed(SETTINGS, seed=1))[0]["base"] != first[0]["base"]


def test_each_token_has_the_nats_of_both_models(model):
    tokens = sample(model)[0]["tokens"]

    assert len(tokens) == 22
    assert all(token["base_nats"] > 0 and token["adapted_nats"] > 0 for token in tokens)
    assert any(abs(token["base_nats"] - token["adapted_nats"]) > 0.01 for token in tokens)
