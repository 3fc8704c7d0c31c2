"""Text written by a tiny model: the same for the same seed, piece by piece, with or without the key-value cache."""

import numpy as np
import pytest
import torch
from tiny_llama import EOS, write_tiny_llama
from transformers import LlamaForCausalLM

from pdf2lora.evaluation.generation import continuation, nats_per_token
from pdf2lora.tokens import Encoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny_llama(tmp_path_factory.mktemp("base"))
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), Encoder.load(folder)


def write(tiny, **changes):
    model, encoder = tiny
    settings = {"max_new_tokens": 20, "temperature": 0.0, "seed": 0} | changes
    return continuation(model, encoder.encode(["The sea"])[0], encoder, **settings)


def test_temperature_0_takes_the_likeliest_token_each_time(tiny):
    model, encoder = tiny
    ids = [encoder.bos, *encoder.encode(["The sea"])[0]]
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))

    assert write(tiny) == encoder.tokenizer.decode(ids[8:])


def test_the_seed_alone_decides_the_draws(tiny):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = write(tiny, temperature=1.0, seed=3)

    assert write(tiny, temperature=1.0, seed=3) == first
    assert write(tiny, temperature=1.0, seed=4) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_pieces_come_one_by_one_and_make_up_the_text(tiny):
    pieces = []

    text = write(tiny, temperature=1.0, on_text=pieces.append)

    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_a_character_of_several_tokens_comes_whole(tiny, monkeypatch):
    model, encoder = tiny
    wanted = [int(token) for token in encoder.encode(["aß€"])[0]] + [EOS]
    pieces = []

    def generate(streamer, input_ids, **settings):
        streamer.put(input_ids)
        for token in wanted:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(model, "generate", generate)

    assert write(tiny, on_text=pieces.append) == "aß€"
    assert pieces == ["a", "ß", "€"]


def test_nats_are_those_of_the_whole_text(tiny):
    model, encoder = tiny
    tokens = encoder.encode(["The sea rises."])[0]
    ids = torch.tensor([[encoder.bos, *tokens]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss

    nats = nats_per_token(model, tokens, encoder)

    assert nats.shape == tokens.shape
    assert np.isclose(nats.mean(), float(loss), rtol=1e-5)
