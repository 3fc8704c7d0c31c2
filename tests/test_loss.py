import pytest
import torch
from torch.nn import functional

from pdf2lora.model import loss
from pdf2lora.model.loss import linear_cross_entropy, nats_per_target
from pdf2lora.tokens import IGNORED

POSITIONS, HIDDEN, VOCABULARY = 23, 12, 50
CHUNKS = pytest.mark.parametrize("positions_of_a_chunk", [1, 7, 22, 23, 1000])
DTYPES = pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-5)])


def made_up(dtype, *, ignored=slice(None, None, 4)):
    """Hidden states, the weight of a head, targets of which some are ignored."""
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, dtype=torch.float64, generator=stream).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=stream).to(dtype)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=stream)
    targets[ignored] = IGNORED
    return hidden.requires_grad_(), weight, targets


def whole(hidden, weight, targets):
    """The nats of each target and the gradient of their sum, by PyTorch, from all logits at once in float64."""
    hidden = hidden.detach().double().requires_grad_()
    nats = functional.cross_entropy(hidden @ weight.double().t(), targets, ignore_index=IGNORED, reduction="none")
    nats.sum().backward()
    return nats.detach(), hidden.grad


@pytest.fixture
def chunk(monkeypatch, positions_of_a_chunk):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", positions_of_a_chunk * VOCABULARY + 3)


@CHUNKS
@DTYPES
@pytest.mark.usefixtures("chunk")
def test_loss_and_gradient_are_those_of_whole_logits(dtype, near):
    hidden, weight, targets = made_up(dtype)
    nats, gradient = whole(hidden, weight, targets)

    total = linear_cross_entropy(hidden, weight, targets)
    total.backward()

    assert (total.dtype, total.shape) == (torch.float32, ())
    assert total.item() == pytest.approx(nats.sum().item(), rel=near)
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=near, atol=near)


@CHUNKS
@DTYPES
@pytest.mark.usefixtures("chunk")
def test_nats_of_each_target(dtype, near):
    hidden, weight, targets = made_up(dtype)
    expected, _ = whole(hidden, weight, targets)

    nats = nats_per_target(hidden.detach(), weight, targets)

    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), expected, rtol=near, atol=near)


def test_bfloat16_is_exact_but_for_the_rounding_of_its_logits():
    hidden, weight, targets = made_up(torch.bfloat16)
    logits = (hidden.detach() @ weight.t()).double()
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    total = linear_cross_entropy(hidden, weight, targets)

    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    assert hidden.grad.dtype == torch.bfloat16
    _, gradient = whole(hidden, weight, targets)
    assert (hidden.grad.double() - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("scale", [1 / 512, 3.0])
def test_gradient_is_scaled_by_what_comes_after_the_loss(scale):
    hidden, weight, targets = made_up(torch.float32)
    _, gradient = whole(hidden, weight, targets)

    (linear_cross_entropy(hidden, weight, targets) * scale).backward()

    torch.testing.assert_close(hidden.grad.double(), scale * gradient, rtol=1e-5, atol=1e-6)


def test_gradient_goes_on_into_what_made_the_hidden_states():
    hidden, weight, targets = made_up(torch.float32)
    matrix = torch.eye(HIDDEN).requires_grad_()
    _, gradient = whole(hidden, weight, targets)

    linear_cross_entropy(hidden @ matrix, weight, targets).backward()

    torch.testing.assert_close(matrix.grad.double(), hidden.detach().double().t() @ gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ignored", "counted"), [(slice(0, 0), POSITIONS), (slice(None), 0), (slice(1, None), 1)])
def test_ignored_targets_count_nothing(ignored, counted):
    hidden, weight, targets = made_up(torch.float32, ignored=ignored)

    total = linear_cross_entropy(hidden, weight, targets)
    total.backward()

    rows_with_gradient = hidden.grad.abs().sum(dim=1) > 0
    assert torch.equal(rows_with_gradient, targets != IGNORED)
    assert rows_with_gradient.sum() == counted
    assert (total.item() > 0) == (counted > 0)
    assert torch.equal(nats_per_target(hidden.detach(), weight, targets) > 0, targets != IGNORED)


def test_large_logits_are_no_infinity():
    hidden, weight, targets = made_up(torch.float32)
    expected, _ = whole(1000 * hidden, weight, targets)

    torch.testing.assert_close(
        nats_per_target(1000 * hidden.detach(), weight, targets).double(), expected, rtol=1e-5, atol=1e-3
    )


def test_gradient_is_there_once():
    """It is made in the forward pass and scaled in place: a second backward pass would scale it twice."""
    hidden, weight, targets = made_up(torch.float32)
    total = linear_cross_entropy(hidden, weight, targets)
    total.backward(retain_graph=True)

    with pytest.raises(AttributeError):
        total.backward()


def test_logits_of_a_chunk_are_all_that_exist_at_once(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 5 * VOCABULARY)
    sizes = []
    cross_entropy_ = loss._cross_entropy_

    def note_size(logits, targets, *, gradient):
        sizes.append(tuple(logits.shape))
        return cross_entropy_(logits, targets, gradient=gradient)

    monkeypatch.setattr(loss, "_cross_entropy_", note_size)
    linear_cross_entropy(*made_up(torch.float32))

    assert sizes == [(5, VOCABULARY)] * 4 + [(3, VOCABULARY)]
