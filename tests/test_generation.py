"""Generation with a tiny model: sampling, seed, batch, streaming; with transformers' cache and with whole passes."""

import numpy as np
import pytest
import torch
from tiny_llama import EOS, changed, write_tiny_llama
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaForCausalLM

from pdf2lora.evaluation import generation
from pdf2lora.evaluation.generation import generate, token_nats
from pdf2lora.model.forward import build_forward
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder

SETTINGS = Sample(num_documents=1, prompt_tokens=1, max_new_tokens=20, temperature=0.0, seed=0)


class FastForward:
    """Stands for the fused kernels: a pass over whole texts is faster than transformers' cache."""

    def __init__(self, forward):
        self.forward, self.model, self.head = forward, forward.model, forward.head

    def __call__(self, input_ids):
        return self.forward(input_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=["cache", "passes"])
def tiny(folder, request):
    forward = build_forward(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), "reference")
    return forward if request.param == "cache" else FastForward(forward), Encoder.load(folder)


def generate_texts(tiny, prompts, on_text=None, **changes):
    forward, encoder = tiny
    return generate(forward, encoder.encode(prompts), encoder, changed(SETTINGS, **changes), on_text)


def most_probable(tiny, prompt, ends=()):
    """The ids of 20 tokens, or up to the first one in `ends`."""
    forward, encoder = tiny
    ids = [encoder.bos, *encoder.encode([prompt])[0]]
    start = len(ids)
    while len(ids) < start + 20 and (len(ids) == start or ids[-1] not in ends):
        with torch.no_grad():
            ids.append(int(forward.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_temperature_0_takes_the_most_probable_token(tiny):
    assert generate_texts(tiny, ["The sea"]) == [tiny[1].tokenizer.decode(most_probable(tiny, "The sea"))]


def test_prompts_of_a_batch_do_not_depend_on_each_other(tiny):
    prompts = ["The sea", "A much longer prompt about rivers", "Ice"]

    assert generate_texts(tiny, prompts) == [generate_texts(tiny, [prompt])[0] for prompt in prompts]


def test_an_end_token_ends_its_text_only(tiny, monkeypatch):
    forward, encoder = tiny
    prompts = ["The sea", "A much longer prompt about rivers", "Ice"]
    end = most_probable(tiny, prompts[0])[3]
    monkeypatch.setattr(forward.model.config, "eos_token_id", [EOS, end])

    ids = [most_probable(tiny, prompt, (EOS, end)) for prompt in prompts]

    assert len(set(map(len, ids))) > 1
    assert generate_texts(tiny, prompts) == [encoder.tokenizer.decode(text) for text in ids]


@pytest.mark.parametrize(("limit", "window"), [(10, None), (4096, 16)], ids=["many tokens", "longer than the window"])
def test_some_texts_always_use_the_cache(tiny, monkeypatch, limit, window):
    forward, _ = tiny
    texts = generate_texts(tiny, ["The sea", "Ice"])
    monkeypatch.setattr(generation, "MAX_TOKENS_OF_A_PASS", limit)
    monkeypatch.setattr(generation, "sliding_window", lambda config: window)
    monkeypatch.setattr(type(forward), "__call__", None)

    assert generate_texts(tiny, ["The sea", "Ice"]) == texts


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


@pytest.mark.parametrize("tiny", ["cache"], indirect=True)
def test_a_character_of_several_tokens_is_one_piece(tiny, monkeypatch):
    forward, encoder = tiny
    ids = [int(token) for token in encoder.encode(["aß€"])[0]] + [EOS]
    pieces = []

    def stream(streamer, input_ids, **settings):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    monkeypatch.setattr(forward.model, "generate", stream)

    assert generate_texts(tiny, ["The sea"], on_text=pieces.append) == ["aß€"]
    assert pieces == ["a", "ß", "€"]


def test_a_continuation_keeps_the_space_before_it(tiny, monkeypatch):
    """Decoders as in Llama 2 and Mistral remove the first space of a text."""
    words = ["<unk>", "<s>", "</s>", "▁The", "▁ice", "▁melts"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])

    def continuation(forward, starts, encoder, settings, streamer):
        for tokens in ([1, 3], [4], [5]):
            streamer.put(torch.tensor(tokens))
        streamer.end()
        return torch.tensor([[4, 5]])

    monkeypatch.setattr(generation, "_continue_with_cache", continuation)
    monkeypatch.setattr(generation, "_continue_with_passes", continuation)
    pieces = []

    assert generate_texts((tiny[0], Encoder(tokenizer, 1, 2)), ["The"], on_text=pieces.append) == [" ice melts"]
    assert pieces == [" ice", " melts"]


@pytest.mark.parametrize("tiny", ["cache"], indirect=True)
def test_the_mean_of_the_nats_is_the_loss_of_transformers(tiny):
    forward, encoder = tiny
    model = forward.model
    tokens = encoder.encode(["The sea rises."])[0]
    ids = torch.tensor([[encoder.bos, *tokens]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss

    nats = token_nats(model, tokens, encoder)

    assert nats.shape == tokens.shape
    assert np.isclose(nats.mean(), float(loss), rtol=1e-5)
