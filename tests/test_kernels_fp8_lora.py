"""Products of fp8 with LoRA's columns, compared with exact products."""

import pytest
import torch
from interpreted import (  # noqa: F401
    cpu_kernels,
    linear4bit,
    present,
    random,
    relative_error,
    scaled_product,
)

from pdf2lora.model.kernels import frozen
from pdf2lora.model.kernels.fp8_lora import LoraColumns, append, append_to_weights, num_columns
from pdf2lora.model.kernels.rows import FP8, quantize

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def norms(matrix):
    """Of the rows."""
    return torch.linalg.vector_norm(matrix, dim=1)


def with_columns(x, a):
    """Rows of x with the columns of x A^T."""
    rows = quantize(x, num_columns(len(a)))
    append(rows, x @ a.t(), norms(a))
    return rows


def product_of_columns(rows, fp8, scale, num_features):
    left = present(rows.fp8).float()[:, num_features:] * present(rows.scale)
    return left @ (fp8.float()[:, num_features:] * scale[:, None]).t()


@pytest.mark.parametrize(("num_features", "rank"), [(128, 16), (200, 48), (96, 20)])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_columns_are_nearly_as_exact_as_bfloat16(num_features, rank, size):
    x, a = random(70, num_features), random(rank, num_features, seed=1) / num_features**0.5
    b = size * random(40, rank, seed=2)
    fp8, scale = torch.zeros(40, num_features + num_columns(rank), dtype=FP8), torch.full((40,), 3.0 / 448)

    larger_scale = append_to_weights(LoraColumns(b, norms(a)), scale, fp8)
    found = product_of_columns(with_columns(x, a), fp8, larger_scale, num_features)

    assert relative_error(found, x @ a.t() @ b.t()) < 0.004
    assert (larger_scale >= scale).all()
    assert torch.equal(larger_scale, scale) == (size < 1)


def test_the_columns_keep_other_values():
    x, a = random(5, 64), random(16, 64, seed=1)
    fp8 = random(9, 64 + 128, seed=2).to(FP8)
    before = fp8.clone()

    append_to_weights(LoraColumns(random(9, 16), norms(a)), torch.ones(9), fp8)

    assert torch.equal(fp8[:, :64].float(), before[:, :64].float())
    assert torch.equal(present(with_columns(x, a).fp8)[:, :64].float(), present(quantize(x).fp8).float())


def test_no_row_along_a_saturates():
    """The largest possible product: a row of x that is a multiple of a row of A."""
    a = random(16, 4096, seed=1)
    x = 3.0 * a
    rows = with_columns(x, a)

    columns = present(rows.fp8).float()[:, 4096:] * present(rows.scale)
    found = (columns[:, :16] + columns[:, 16:32]) * 32 * norms(a)

    torch.testing.assert_close(found.diagonal(), (x @ a.t()).diagonal(), rtol=0.01, atol=0.0)


def test_a_number_that_is_too_large_becomes_the_largest_one():
    rows = quantize(torch.ones(1, 64), 128)

    append(rows, torch.full((1, 16), 1e6), torch.ones(16))

    high, low, again, *zeros = present(rows.fp8).float()[:, 64:].split(16, dim=1)
    assert (high == 448).all()
    assert (low == 448).all()
    assert (again == 448).all()
    assert not any(zero.any() for zero in zeros)


def test_lora_without_any_effect_is_zero():
    """B is zero before the first step, and so are its gradient and its norms."""
    rows = quantize(torch.zeros(2, 64), 128)
    fp8 = torch.ones(9, 64 + 128).to(FP8)

    append(rows, torch.zeros(2, 16), torch.zeros(16))
    scale = append_to_weights(LoraColumns(torch.zeros(9, 16), torch.ones(16)), torch.ones(9), fp8)

    assert (present(rows.fp8).float()[:, 64:] == 0).all()
    assert (fp8.float()[:, 64:] == 0).all()
    assert torch.equal(scale, torch.ones(9))


def test_products_in_both_directions_include_lora(monkeypatch):
    """Two stacked weights, LoRA for the second one. The products differ from those without LoRA by LoRA's product."""
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    stack = frozen.Frozen([linear4bit(40, 128), linear4bit(24, 128, seed=1)], torch.float32)
    stack.compute_fp8_scales()
    a, b = random(16, 128, seed=2) / 128**0.5, torch.zeros(64, 16)
    b[40:] = 0.01 * random(24, 16, seed=3)
    x, grad = random(30, 128, seed=4), random(30, 64, seed=5)
    b_norms = torch.linalg.vector_norm(b, dim=0)
    weights = frozen.Weights(stack, output_columns=LoraColumns(b, norms(a)), input_columns=LoraColumns(a.t(), b_norms))
    plain = frozen.Weights(stack)
    grad_rows = quantize(grad, 128)
    append(grad_rows, grad @ b, b_norms)

    of_lora = stack.forward(with_columns(x, a), weights) - stack.forward(quantize(x), plain)
    of_gradient = stack.backward(grad_rows, weights) - stack.backward(quantize(grad), plain)

    assert relative_error(of_lora, x @ a.t() @ b.t()) < 0.005
    assert (of_lora[:, :40].abs() < 1e-4).all()
    assert relative_error(of_gradient, grad @ b @ a) < 0.005
