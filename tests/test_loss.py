import pytest
import torch
from torch.nn import functional

from pdf2lora.model import loss
from pdf2lora.model.head import Head
from pdf2lora.model.loss import linear_cross_entropy, nats_per_target
from pdf2lora.tokens import IGNORED

POSITIONS, HIDDEN, VOCABULARY = 23, 12, 50
CHUNKS = pytest.mark.parametrize("positions_per_chunk", [1, 7, 22, 23, 1000])
DTYPES = pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-5)])
HEADS = pytest.mark.parametrize(
    "settings",
    [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": 2.0, "softcap": 5.0}],
    ids=lambda settings: "-".join(settings) or "linear",
)


def random_case(dtype, *, ignored=slice(None, None, 4), bias=False, **settings):
    """Hidden states, a head, targets; some targets are ignored."""
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, dtype=torch.float64, generator=stream).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=stream).to(dtype)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=stream)
    targets[ignored] = IGNORED
    bias = torch.randn(VOCABULARY, dtype=torch.float64, generator=stream).to(dtype) if bias else None
    return hidden.requires_grad_(), Head(weight, bias, **settings), targets


def expected_nats_and_gradient(hidden, head, targets):
    """The nats of each target and the gradient of their sum, by PyTorch from all logits at once, in float64."""
    hidden = hidden.detach().double().requires_grad_()
    logits = hidden @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    nats = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    nats.sum().backward()
    return nats.detach(), hidden.grad


@pytest.fixture
def chunk(monkeypatch, positions_per_chunk):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", positions_per_chunk * VOCABULARY + 3)


@CHUNKS
@DTYPES
@pytest.mark.usefixtures("chunk")
@HEADS
def test_loss_and_gradient_are_those_of_whole_logits(dtype, near, settings):
    hidden, head, targets = random_case(dtype, **settings)
    nats, gradient = expected_nats_and_gradient(hidden, head, targets)

    total = linear_cross_entropy(hidden, head, targets)
    total.backward()

    assert (total.dtype, total.shape) == (torch.float32, ())
    assert total.item() == pytest.approx(nats.sum().item(), rel=near)
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=near, atol=near)


@CHUNKS
@DTYPES
@pytest.mark.usefixtures("chunk")
@HEADS
def test_nats_of_each_target(dtype, near, settings):
    hidden, head, targets = random_case(dtype, **settings)
    expected, _ = expected_nats_and_gradient(hidden, head, targets)

    nats = nats_per_target(hidden.detach(), head, targets)

    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), expected, rtol=near, atol=near)


def test_bfloat16_rounds_only_its_logits():
    hidden, head, targets = random_case(torch.bfloat16)
    logits = (hidden.detach() @ head.weight.t()).double()
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    total = linear_cross_entropy(hidden, head, targets)

    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    assert hidden.grad.dtype == torch.bfloat16
    _, gradient = expected_nats_and_gradient(hidden, head, targets)
    assert (hidden.grad.double() - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("scale", [1 / 512, 3.0])
def test_gradient_is_scaled(scale):
    hidden, head, targets = random_case(torch.float32)
    _, gradient = expected_nats_and_gradient(hidden, head, targets)

    (linear_cross_entropy(hidden, head, targets) * scale).backward()

    torch.testing.assert_close(hidden.grad.double(), scale * gradient, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_layers_below():
    hidden, head, targets = random_case(torch.float32)
    matrix = torch.eye(HIDDEN).requires_grad_()
    _, gradient = expected_nats_and_gradient(hidden, head, targets)

    linear_cross_entropy(hidden @ matrix, head, targets).backward()

    torch.testing.assert_close(matrix.grad.double(), hidden.detach().double().t() @ gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ignored", "num_counted"), [(slice(0, 0), POSITIONS), (slice(None), 0), (slice(1, None), 1)])
def test_ignored_targets_have_no_nats_and_no_gradient(ignored, num_counted):
    hidden, head, targets = random_case(torch.float32, ignored=ignored)

    total = linear_cross_entropy(hidden, head, targets)
    total.backward()

    rows_with_gradient = hidden.grad.abs().sum(dim=1) > 0
    assert torch.equal(rows_with_gradient, targets != IGNORED)
    assert rows_with_gradient.sum() == num_counted
    assert (total.item() > 0) == (num_counted > 0)
    assert torch.equal(nats_per_target(hidden.detach(), head, targets) > 0, targets != IGNORED)


def test_large_logits_give_finite_nats():
    hidden, head, targets = random_case(torch.float32)
    expected, _ = expected_nats_and_gradient(1000 * hidden, head, targets)

    torch.testing.assert_close(
        nats_per_target(1000 * hidden.detach(), head, targets).double(), expected, rtol=1e-5, atol=1e-3
    )


def test_loss_allows_one_backward_pass():
    """The backward pass scales the gradient in place: a second one would scale it twice."""
    hidden, head, targets = random_case(torch.float32)
    total = linear_cross_entropy(hidden, head, targets)
    total.backward(retain_graph=True)

    with pytest.raises(AttributeError):
        total.backward()


def test_logits_exist_in_chunks_only(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 5 * VOCABULARY)
    sizes = []
    cross_entropy_ = loss._cross_entropy_

    def note_size(logits, targets, *, gradient):
        sizes.append(tuple(logits.shape))
        return cross_entropy_(logits, targets, gradient=gradient)

    monkeypatch.setattr(loss, "_cross_entropy_", note_size)
    linear_cross_entropy(*random_case(torch.float32))

    assert sizes == [(5, VOCABULARY)] * 4 + [(3, VOCABULARY)]
