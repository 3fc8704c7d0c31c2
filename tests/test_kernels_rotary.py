import pytest
import torch
from interpreted import cpu_kernels, random  # noqa: F401

from pdf2lora.model.kernels import attention
from pdf2lora.model.kernels.rotary import Angles, HeadNorm, Up, normalize_and_rotate, rotary_backward, rotate_

pytestmark = pytest.mark.usefixtures("cpu_kernels")


HEADS = attention.Heads(num_queries=3, num_keys=1, head_dim=24, seq_length=11)


def angles(heads):
    half = heads.head_dim // 2
    angle = torch.arange(heads.seq_length)[:, None] / 100 ** (torch.arange(half) / half)
    return Angles(angle.cos(), angle.sin())


def rotated(x, cos, sin):
    """As transformers writes it; x: (batch, heads, seq_length, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


def up(first_ranks):
    """B of the projections that have LoRA, each in its own rows and ranks."""
    ranks = 16 * sum(first >= 0 for first in first_ranks)
    b, first_row = torch.zeros(HEADS.width, ranks), 0
    for first, num_heads in zip(first_ranks, (HEADS.num_queries, HEADS.num_keys, HEADS.num_keys), strict=True):
        num_rows = num_heads * HEADS.head_dim
        if first >= 0:
            b[first_row : first_row + num_rows, first : first + 16] = random(num_rows, 16, seed=first)
        first_row += num_rows
    return Up(b, first_ranks, 16)


TOKENS = 7 * HEADS.seq_length  # more than one block


def test_queries_and_keys_are_rotated_and_values_are_not():
    qkv = random(TOKENS, HEADS.width)
    query, key, value = (part.clone() for part in HEADS.split(qkv))

    rotate_(qkv, angles(HEADS), HEADS)

    found = HEADS.split(qkv)
    torch.testing.assert_close(found[0], rotated(query, *angles(HEADS)))
    torch.testing.assert_close(found[1], rotated(key, *angles(HEADS)))
    assert torch.equal(found[2], value)


@pytest.mark.parametrize("first_ranks", [None, (0, 16, 32), (0, -1, 16), (-1, 0, -1), (-1, -1, 0)])
def test_rotary_backward_is_the_gradient_of_the_product_and_of_lora(first_ranks):
    rows, adapter = random(TOKENS, HEADS.width).requires_grad_(), first_ranks and up(first_ranks)
    low_rank = adapter and random(TOKENS, adapter.b.shape[1], seed=1).requires_grad_()
    query, key, value = HEADS.split(rows if adapter is None else rows + low_rank @ adapter.b.t())
    gradients = tuple(random(*part.shape, seed=seed) for seed, part in enumerate((query, key, value)))
    outputs = (rotated(query, *angles(HEADS)), rotated(key, *angles(HEADS)), value)
    torch.autograd.backward(outputs, gradients)
    strided = HEADS.split(torch.cat([part.transpose(1, 2) for part in gradients], dim=2).reshape(TOKENS, -1))

    for of_either_strides in (gradients, strided):
        grad_rows, grad_low_rank = rotary_backward(of_either_strides, angles(HEADS), HEADS, adapter)

        torch.testing.assert_close(grad_rows, rows.grad, rtol=1e-5, atol=1e-6)
        if adapter is None:
            assert grad_low_rank is None
        else:
            torch.testing.assert_close(grad_low_rank, low_rank.grad, rtol=1e-4, atol=1e-4)


def test_rows_of_heads_are_in_the_order_of_the_output_projection():
    attended = random(2, HEADS.num_queries, HEADS.seq_length, HEADS.head_dim)

    rows = HEADS.rows(attended)

    assert rows.shape == (2 * HEADS.seq_length, HEADS.num_queries * HEADS.head_dim)
    assert torch.equal(rows[HEADS.seq_length + 3, 24:48], attended[1, 1, 3])


def normalized(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("is_rotated", [True, False])
@pytest.mark.parametrize("first_ranks", [None, (0, 16, 32)])
def test_head_norm_and_its_gradient(first_ranks, is_rotated):
    rows, adapter = random(TOKENS, HEADS.width).requires_grad_(), first_ranks and up(first_ranks)
    norm = HeadNorm(1 + 0.5 * random(2, HEADS.head_dim, seed=7), 1e-5)
    low_rank = adapter and random(TOKENS, adapter.b.shape[1], seed=1).requires_grad_()
    product = rows if adapter is None else rows + low_rank @ adapter.b.t()
    parts = HEADS.split(product)
    outputs = [normalized(part, weight, 1e-5) for part, weight in zip(parts, norm.weight, strict=False)]
    used_angles = angles(HEADS) if is_rotated else None
    if used_angles:
        outputs = [rotated(part, *used_angles) for part in outputs]
    gradients = tuple(random(*part.shape, seed=seed) for seed, part in enumerate(parts))
    torch.autograd.backward((*outputs, parts[2]), gradients)
    qkv = product.detach().clone()

    query_and_key = normalize_and_rotate(qkv, used_angles, HEADS, norm)
    grad_rows, grad_low_rank = rotary_backward(gradients, used_angles, HEADS, adapter, qkv, norm)

    assert torch.equal(qkv, product)
    for part, expected in zip(HEADS.split_queries_and_keys(query_and_key), outputs, strict=True):
        torch.testing.assert_close(part, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_rows, rows.grad, rtol=1e-4, atol=1e-5)
    if adapter is not None:
        torch.testing.assert_close(grad_low_rank, low_rank.grad, rtol=1e-4, atol=1e-4)
