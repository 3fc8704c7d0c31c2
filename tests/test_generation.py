"""Generation with a tiny model: sampling, seed, batch, streaming."""

import numpy as np
import pytest
import torch
from tiny_llama import EOS, changed, write_tiny_llama
from transformers import LlamaForCausalLM

from pdf2lora.evaluation.generation import generate, token_nats
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder

SETTINGS = Sample(num_documents=1, prompt_tokens=1, max_new_tokens=20, temperature=0.0, seed=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny_llama(tmp_path_factory.mktemp("base"))
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), Encoder.load(folder)


def generate_texts(tiny, prompts, on_text=None, **changes):
    model, encoder = tiny
    return generate(model, encoder.encode(prompts), encoder, changed(SETTINGS, **changes), on_text)


def test_temperature_0_takes_the_most_probable_token(tiny):
    model, encoder = tiny
    ids = [encoder.bos, *encoder.encode(["The sea"])[0]]
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))

    assert generate_texts(tiny, ["The sea"]) == [encoder.tokenizer.decode(ids[8:])]


def test_prompts_of_a_batch_do_not_depend_on_each_other(tiny):
    prompts = ["The sea", "A much longer prompt about rivers", "Ice"]

    assert generate_texts(tiny, prompts) == [generate_texts(tiny, [prompt])[0] for prompt in prompts]


def test_the_seed_decides_the_text(tiny):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate_texts(tiny, ["The sea"], temperature=1.0, seed=3)

    assert generate_texts(tiny, ["The sea"], temperature=1.0, seed=3) == first
    assert generate_texts(tiny, ["The sea"], temperature=1.0, seed=4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_text_is_streamed_in_pieces(tiny):
    pieces = []

    (text,) = generate_texts(tiny, ["The sea"], on_text=pieces.append, temperature=1.0)

    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_a_character_of_several_tokens_is_one_piece(tiny, monkeypatch):
    model, encoder = tiny
    ids = [int(token) for token in encoder.encode(["aß€"])[0]] + [EOS]
    pieces = []

    def stream(streamer, input_ids, **settings):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    monkeypatch.setattr(model, "generate", stream)

    assert generate_texts(tiny, ["The sea"], on_text=pieces.append) == ["aß€"]
    assert pieces == ["a", "ß", "€"]


def test_the_mean_of_the_nats_is_the_loss_of_transformers(tiny):
    model, encoder = tiny
    tokens = encoder.encode(["The sea rises."])[0]
    ids = torch.tensor([[encoder.bos, *tokens]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss

    nats = token_nats(model, tokens, encoder)

    assert nats.shape == tokens.shape
    assert np.isclose(nats.mean(), float(loss), rtol=1e-5)
