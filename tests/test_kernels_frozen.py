import pytest
import torch
from interpreted import (  # noqa: F401
    cpu_kernels,
    dequantized,
    linear4bit,
    present,
    random,
    relative_error,
    scaled_product,
)

from pdf2lora.model.kernels import frozen
from pdf2lora.model.kernels.dequantize import Lora
from pdf2lora.model.kernels.rows import Rows, quantize

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def test_frozen_products_are_those_of_the_stacked_weights():
    linears = [linear4bit(40, 128), linear4bit(24, 128, seed=1)]
    stacked = torch.cat([dequantized(linear) for linear in linears])
    stack = frozen.Frozen(linears, torch.float32)
    x, grad = random(9, 128, seed=2), random(9, 64, seed=3)
    lora = Lora(random(16, 128, seed=4), random(24, 16, seed=5))
    merged = torch.cat([stacked[:40], stacked[40:] + lora.b @ lora.a])

    assert stack.shape == (64, 128)
    for weights, expected in [(frozen.Weights(stack), stacked), (frozen.Weights(stack, [None, lora]), merged)]:
        torch.testing.assert_close(weights.values, expected)
        torch.testing.assert_close(stack.forward(Rows(x), weights), x @ expected.t())
        torch.testing.assert_close(stack.backward(Rows(grad), weights), grad @ expected)


@pytest.mark.parametrize("fp8", [False, True])
def test_products_share_weights_and_write_into_a_part_of_a_tensor(monkeypatch, fp8):
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    stack = frozen.Frozen([linear4bit(40, 128, bias=True)], torch.float32)
    if fp8:
        stack.compute_fp8_scales()
    x, grad = random(9, 128, seed=2), random(9, 40, seed=3)
    x, grad = (quantize(x), quantize(grad)) if fp8 else (Rows(x), Rows(grad))
    weights = frozen.Weights(stack)
    expected = stack.forward(x, weights), stack.backward(grad, weights)
    for name in ("dequantize", "convert_to_fp8"):
        monkeypatch.delattr(frozen, name)  # another conversion fails

    for product, left, whole in [(stack.forward, x, expected[0]), (stack.backward, grad, expected[1])]:
        out = torch.full((12, whole.shape[1]), float("nan"))
        product(left.part(slice(2, 7)), weights, out[3:8])
        torch.testing.assert_close(out[3:8], whole[2:7])
        assert out[[2, 8]].isnan().all()


def test_fp8_products_in_both_directions(monkeypatch):
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    linears = [linear4bit(40, 128), linear4bit(24, 128, seed=1)]
    stack = frozen.Frozen(linears, torch.float32)
    exact = frozen.Weights(stack).values
    x, grad = random(200, 128, seed=2), random(200, 64, seed=3)

    stack.compute_fp8_scales()

    scales, weights = present(stack.fp8_scales), frozen.Weights(stack)
    torch.testing.assert_close(scales.by_output, exact.abs().amax(1) / 448)
    torch.testing.assert_close(scales.by_input, exact.abs().amax(0) / 448)
    assert 0.01 < relative_error(stack.forward(quantize(x), weights), x @ exact.t()) < 0.06
    assert 0.01 < relative_error(stack.backward(quantize(grad), weights), grad @ exact) < 0.06


@pytest.mark.parametrize("fp8", [False, True])
def test_biases_are_added_to_the_product(monkeypatch, fp8):
    """The second layer has none."""
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    linears = [linear4bit(40, 128, bias=True), linear4bit(24, 128, seed=1)]
    stack = frozen.Frozen(linears, torch.float32)
    if fp8:
        stack.compute_fp8_scales()
    x = random(9, 128, seed=2)
    rows = quantize(x) if fp8 else Rows(x)
    bias = torch.cat([linears[0].bias.detach(), torch.zeros(24)])
    without = frozen.Frozen(linears, torch.float32)
    without.bias, without.fp8_scales = None, stack.fp8_scales
    weights = frozen.Weights(stack)

    torch.testing.assert_close(stack.forward(rows, weights), without.forward(rows, weights) + bias)
