import pytest
import torch
from interpreted import cpu_kernels, present, random  # noqa: F401

from pdf2lora.model.dropout import DropoutRate, keep_mask
from pdf2lora.model.kernels import lora

pytestmark = pytest.mark.usefixtures("cpu_kernels")


STATE = torch.tensor([7, 0])


def mask_of(p, layer_index, shape, *, state=STATE, seq_length=1):
    return keep_mask(state, layer_index, shape[0], seq_length, shape[1], DropoutRate(p))


def counter(p, layer_index):
    return lora.DropoutCounter(STATE, layer_index, 1, DropoutRate(p))


SHAPES = pytest.mark.parametrize(("tokens", "features"), [(150, 100), (5, 48)])  # three splits of 64 tokens, and one


@SHAPES
@pytest.mark.parametrize(("projections", "rank"), [(1, 16), (2, 16), (3, 16), (1, 32), (3, 64), (2, 256)])
def test_lora_and_its_gradients_are_those_of_the_explicit_mask(tokens, features, projections, rank):
    p, layer_index, rate = 0.3, 11, DropoutRate(0.3)
    x, a = random(tokens, features), random(projections * rank, features, seed=1)
    grad_low_rank, grad_x = random(tokens, projections * rank, seed=2), random(tokens, features, seed=3)
    expected_low_rank, expected_a, expected_x = [], [], grad_x.clone()
    for number, (matrix, grad) in enumerate(zip(a.split(rank), grad_low_rank.split(rank, dim=1), strict=True)):
        mask = mask_of(p, layer_index + number, (tokens, features)) * rate.scale
        expected_low_rank.append((x * mask) @ matrix.t())
        expected_a.append(grad.t() @ (x * mask))
        expected_x += (grad @ matrix) * mask

    low_rank, mask = lora.down(x, a, rank, counter(p, layer_index))
    grad_a = lora.gradient_of_a(x, grad_low_rank, rank, mask, rate.scale)
    lora.add_gradient_of_x_(grad_x, a, grad_low_rank, rank, mask, rate.scale)

    torch.testing.assert_close(low_rank, torch.cat(expected_low_rank, dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_a, torch.cat(expected_a), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-4, atol=1e-4)


def test_mask_of_a_projection_has_a_bit_for_each_feature():
    _, mask = lora.down(random(70, 44), random(32, 44, seed=1), 16, counter(0.3, 5))

    assert (mask.shape, mask.dtype) == ((2, 70, 6), torch.uint8)
    bits = (mask[..., None] >> torch.arange(8)) & 1
    for number in (0, 1):
        assert torch.equal(bits[number].flatten(1)[:, :44].bool(), mask_of(0.3, 5 + number, (70, 44)))
