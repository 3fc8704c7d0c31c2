import math

import numpy as np
import pytest
import torch
from tiny_llama import BOS, COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, quiet, write_tiny_llama

from pdf2lora.evaluation.intervals import bootstrap, summary
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.windows import TextSize
from pdf2lora.model import loss
from pdf2lora.model.forward import build_forward
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.tokens import windows

pytestmark = quiet
SEQ_LENGTH, STRIDE = 24, 10
LENGTHS = (100, 7, 0, 24, 25, 61)  # with a document of no token, and one of exactly a window
DOCUMENTS = [np.random.default_rng(number).integers(0, 256, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return adapted(base, bits=16)


def adapted(base, *, bits, lora=LORA):
    """With a new adapter, which changes nothing yet."""
    return add_lora(load_base(base, changed(QUANTIZATION, bits=bits), COMPUTE), lora)


def redraw_b(model):
    """As after a training."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)


def nats_of(model, *, documents=DOCUMENTS, per_device_batch=4, **kwargs):
    looks = [
        window
        for number, tokens in enumerate(documents)
        for window in windows(number, tokens, bos=BOS, seq_length=SEQ_LENGTH, stride=STRIDE)
    ]
    forward = build_forward(model, "reference")
    return nats_per_document(forward, looks, num_documents=len(documents), per_device_batch=per_device_batch, **kwargs)


def nats_the_plain_way(model, tokens):
    """One document, one window at a time, nothing filled up, all logits, in float64."""
    text = [BOS, *tokens.tolist()]
    nats, scored_until = 0.0, 1  # bos is given
    while scored_until < len(text):
        last = min(len(text), SEQ_LENGTH + 1 if scored_until == 1 else scored_until + STRIDE)
        first = max(0, last - 1 - SEQ_LENGTH)
        with torch.no_grad():
            logits = model(torch.tensor([text[first : last - 1]]).to(model.device)).logits[0].double().cpu()
        for place in range(scored_until, last):
            scores = logits[place - 1 - first]
            nats += float(torch.logsumexp(scores, 0) - scores[text[place]])
        scored_until = last
    return nats


@pytest.mark.parametrize("bits", [4, 16])
def test_nats_are_those_of_a_plain_computation(base, bits):
    model = adapted(base, bits=bits).eval()
    redraw_b(model)
    expected = [nats_the_plain_way(model, tokens) for tokens in DOCUMENTS]

    assert nats_of(model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("per_device_batch", [1, 2, 3, 8])
def test_batch_size_changes_nothing(model, per_device_batch):
    nats = nats_of(model, per_device_batch=per_device_batch)

    assert nats == pytest.approx(nats_of(model, per_device_batch=5), rel=1e-6)


def test_order_of_documents_changes_nothing(model):
    backwards = nats_of(model, documents=DOCUMENTS[::-1])

    assert backwards[::-1] == pytest.approx(nats_of(model), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7])
def test_size_of_a_chunk_of_logits_changes_nothing(model, monkeypatch, chunk):
    expected = nats_of(model)
    monkeypatch.setattr(loss, "LOGITS_OF_A_CHUNK", chunk * VOCABULARY_SIZE)

    assert nats_of(model) == pytest.approx(expected, rel=1e-6)


def test_document_without_tokens_has_no_nats(model):
    nats = nats_of(model)

    assert [number for number, value in enumerate(nats) if value == 0] == [LENGTHS.index(0)]


def test_model_is_asked_in_eval_mode_and_left_in_it(model):
    expected = nats_of(model.eval())

    model.train()

    assert nats_of(model).tolist() == expected.tolist()
    assert not model.training


def test_dropout_of_an_adapter_does_not_count_and_the_adapter_does(base):
    model = adapted(base, bits=16, lora=changed(LORA, lora_dropout=0.5))
    base_nats = nats_of(model)
    redraw_b(model.train())

    with_adapter = nats_of(model)

    assert with_adapter.tolist() == nats_of(model).tolist()
    assert not np.allclose(with_adapter, base_nats, rtol=0.01)
    with model.disable_adapter():
        assert nats_of(model).tolist() == base_nats.tolist()


def test_progress_counts_windows(model):
    steps = []

    nats_of(model, per_device_batch=4, progress=steps.append)

    num_windows = sum(len(windows(0, tokens, bos=BOS, seq_length=SEQ_LENGTH, stride=STRIDE)) for tokens in DOCUMENTS)
    assert sum(steps) == num_windows
    assert set(steps[:-1]) == {4}


def test_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model):
    torch.nn.init.zeros_(model.get_base_model().lm_head.weight)

    numbers = summary(nats_of(model), [TextSize(tokens=length, bytes=length, words=1) for length in LENGTHS])

    assert numbers["perplexity"] == pytest.approx(VOCABULARY_SIZE, rel=1e-6)
    assert numbers["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY_SIZE), rel=1e-6)


# summary


def test_summary_by_hand():
    nats = np.array([math.log(2) * 6, math.log(2) * 12])  # 18 bits
    sizes = [TextSize(tokens=2, bytes=10, words=1), TextSize(tokens=7, bytes=26, words=2)]

    assert summary(nats, sizes) == pytest.approx(
        {"perplexity": 2 ** (18 / 9), "bits_per_byte": 18 / 36, "word_perplexity": 2 ** (18 / 3)}, rel=1e-12
    )


def test_summary_weighs_tokens_and_not_documents():
    sizes = [TextSize(tokens=1, bytes=1, words=1), TextSize(tokens=99, bytes=99, words=99)]

    assert summary(np.array([50.0, 50.0]), sizes)["perplexity"] == pytest.approx(math.e)


# bootstrap


def made_up(num_documents=40, seed=0):
    """Nats of a base and of a better model, about 3 and 2.8 a token, and the documents' sizes."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(200, 3000, num_documents)
    base = tokens * draw.normal(3, 0.3, num_documents)
    adapted = base - tokens * draw.normal(0.2, 0.05, num_documents)
    return base, adapted, [TextSize(tokens=int(n), bytes=int(4 * n), words=int(n // 2)) for n in tokens]


def test_intervals_contain_the_point_estimates():
    base, adapted, sizes = made_up()
    point = {"base": summary(base, sizes)["perplexity"], "adapted": summary(adapted, sizes)["perplexity"]}
    point["improvement"] = 1 - point["adapted"] / point["base"]

    intervals = bootstrap(base, adapted, sizes, num_samples=1000, seed=0)

    assert intervals.keys() == point.keys()
    for name, (low, high) in intervals.items():
        assert low < point[name] < high
    assert intervals["improvement"][0] > 0.1


def test_interval_is_that_of_the_resampled_documents():
    """Two documents of one token: a sample holds one of them twice, or both, with probabilities 1/4, 1/4 and 1/2."""
    sizes = [TextSize(1, 1, 1)] * 2

    intervals = bootstrap(np.array([0.0, 2.0]), np.array([0.0, 1.0]), sizes, num_samples=1000, seed=0)

    assert intervals["base"] == pytest.approx((1, math.exp(2)))
    assert intervals["adapted"] == pytest.approx((1, math.exp(1)))
    assert intervals["improvement"] == pytest.approx((0, 1 - math.exp(-1)))


def test_draws_of_documents_are_seeded():
    one, again, other = (bootstrap(*made_up(), num_samples=200, seed=seed) for seed in (1, 1, 2))

    assert one == again
    assert one != other


def test_models_are_compared_on_the_same_draws():
    base, _, sizes = made_up()
    same = bootstrap(base, base, sizes, num_samples=200, seed=0)
    tokens = np.array([size.tokens for size in sizes])
    better_by_a_tenth = bootstrap(base, base + tokens * math.log(0.9), sizes, num_samples=200, seed=0)

    assert same["improvement"] == (0, 0)
    assert same["base"] == same["adapted"]
    assert better_by_a_tenth["improvement"] == pytest.approx((0.1, 0.1), abs=1e-12)


def test_one_document_has_an_interval_of_no_width():
    base, adapted, sizes = made_up(num_documents=1)

    for low, high in bootstrap(base, adapted, sizes, num_samples=100, seed=0).values():
        assert low == high
