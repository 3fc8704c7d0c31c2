"""Negative log-likelihood of documents: it equals a plain computation and does not depend on batch, order or chunks.

The number of processes does not change a byte of it.
"""

import math

import numpy as np
import pytest
import torch
from forked import run_forked
from tiny_llama import BOS, COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, fill_b, quiet

from pdf2lora.evaluation.scoring import nats_per_document, nats_per_token, nats_per_window
from pdf2lora.model import loss
from pdf2lora.model.forward import build_forward
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import windows

pytestmark = quiet
SEQ_LENGTH, STRIDE = 24, 10
LENGTHS = (100, 7, 0, 24, 25, 61)  # one document is empty, one has the length of a window
DOCUMENTS = [np.random.default_rng(number).integers(0, 256, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture
def model(base):
    return adapted(base, bits=16)


def adapted(base, *, bits, lora=LORA):
    """A model with a new adapter, which does not change its output."""
    return add_lora(load_base(base, changed(QUANTIZATION, bits=bits), COMPUTE), lora)


def randomize_b(model):
    """Makes the adapter change the output, as a trained one does."""
    torch.manual_seed(0)
    fill_b(model)


def windows_of(documents=DOCUMENTS):
    return windows(documents, bos=BOS, seq_length=SEQ_LENGTH, stride=STRIDE)


def nats_of(model, *, documents=DOCUMENTS, per_device_batch=4, **kwargs):
    return nats_per_document(
        build_forward(model, "reference"),
        windows_of(documents),
        num_documents=len(documents),
        per_device_batch=per_device_batch,
        processes=Processes(),
        **kwargs,
    )


def reference_nats(model, tokens):
    """One document in float64: one window at a time, without padding, with all logits."""
    text = [BOS, *tokens.tolist()]
    nats, scored_until = 0.0, 1  # bos is not scored
    while scored_until < len(text):
        last = min(len(text), SEQ_LENGTH + 1 if scored_until == 1 else scored_until + STRIDE)
        first = max(0, last - 1 - SEQ_LENGTH)
        with torch.no_grad():
            logits = model(torch.tensor([text[first : last - 1]]).to(model.device)).logits[0].double().cpu()
        for position in range(scored_until, last):
            scores = logits[position - 1 - first]
            nats += float(torch.logsumexp(scores, 0) - scores[text[position]])
        scored_until = last
    return nats


@pytest.mark.parametrize("bits", [4, 16])
def test_nats_equal_a_plain_computation(base, bits):
    model = adapted(base, bits=bits).eval()
    randomize_b(model)
    expected = [reference_nats(model, tokens) for tokens in DOCUMENTS]

    assert nats_of(model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("per_device_batch", [1, 2, 3, 8])
def test_batch_size_does_not_change_the_result(model, per_device_batch):
    nats = nats_of(model, per_device_batch=per_device_batch)

    assert nats == pytest.approx(nats_of(model, per_device_batch=5), rel=1e-6)


def test_order_of_documents_does_not_change_the_result(model):
    reversed_nats = nats_of(model, documents=DOCUMENTS[::-1])

    assert reversed_nats[::-1] == pytest.approx(nats_of(model), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunk_size_of_the_logits_does_not_change_the_result(model, monkeypatch, chunk):
    expected = nats_of(model)
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", chunk * VOCABULARY_SIZE)

    assert nats_of(model) == pytest.approx(expected, rel=1e-6)


def test_an_empty_document_has_zero_nats(model):
    nats = nats_of(model)

    assert [number for number, value in enumerate(nats) if value == 0] == [LENGTHS.index(0)]


def test_scoring_sets_eval_mode(model):
    expected = nats_of(model.eval())

    model.train()

    assert nats_of(model).tolist() == expected.tolist()
    assert not model.training


def test_the_adapter_changes_the_result_and_its_dropout_does_not(base):
    model = adapted(base, bits=16, lora=changed(LORA, lora_dropout=0.5))
    base_nats = nats_of(model)
    randomize_b(model.train())

    with_adapter = nats_of(model)

    assert with_adapter.tolist() == nats_of(model).tolist()
    assert not np.allclose(with_adapter, base_nats, rtol=0.01)
    with model.disable_adapter():
        assert nats_of(model).tolist() == base_nats.tolist()


def test_progress_counts_windows(model):
    counts = []

    nats_of(model, per_device_batch=4, progress=counts.append)

    num_windows = len(windows_of())
    assert sum(counts) == num_windows
    assert set(counts[:-1]) == {4}


def test_a_uniform_model_gives_each_token_the_same_nats(model):
    torch.nn.init.zeros_(model.get_base_model().lm_head.weight)

    assert nats_of(model) == pytest.approx(np.array(LENGTHS) * math.log(VOCABULARY_SIZE), rel=1e-6)


def test_nats_of_windows_add_up(model):
    document_windows = windows_of()
    forward = build_forward(model, "reference")
    expected = nats_of(model)

    per_window = nats_per_window(forward, document_windows, per_device_batch=4, processes=Processes())
    per_token = nats_per_token(forward, document_windows, per_device_batch=4, processes=Processes())

    assert per_window.shape == (len(document_windows),)
    for document in range(len(DOCUMENTS)):
        of_document = [nats for window, nats in zip(document_windows, per_window, strict=True)
                       if window.document == document]  # fmt: skip
        assert sum(of_document) == pytest.approx(expected[document], rel=1e-12)
    assert per_token == pytest.approx(expected.sum() / sum(LENGTHS), rel=1e-12)


@pytest.mark.parametrize("per_device_batch", [4, 100])
def test_the_number_of_processes_changes_no_byte(base, per_device_batch):
    """This also holds with fewer batches than processes. All processes together score each window once."""
    document_windows = windows_of()
    model = adapted(base, bits=4)
    randomize_b(model)
    forward = build_forward(model, "reference")

    def work(processes):
        counts = []
        nats = nats_per_window(
            forward,
            document_windows,
            per_device_batch=per_device_batch,
            processes=processes,
            progress=counts.append,
        )
        return nats.tobytes(), sum(counts)

    results = [run_forked(count, work) for count in (1, 2, 3)]

    assert len({nats for of_count in results for nats, _ in of_count}) == 1
    for of_count in results:
        assert sum(num_windows for _, num_windows in of_count) == len(document_windows)
    if per_device_batch == 4:
        assert all(num_windows > 0 for of_count in results for _, num_windows in of_count)
