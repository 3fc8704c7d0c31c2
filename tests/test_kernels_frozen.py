import bitsandbytes as bnb
import pytest
import torch
from interpreted import cpu_kernels, linear4bit, needs_interpreter, present, random, relative_error, scaled_product  # noqa: F401

from pdf2lora.model.kernels import frozen
from pdf2lora.model.kernels.rows import FP8, Rows, quantize

pytestmark = [needs_interpreter, pytest.mark.usefixtures("cpu_kernels")]


def dequantized(linear):
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(320, 128), (50, 200), (1, 64)])  # 640 blocks of 64, 156.25 and one
def test_dequantized_weights_are_those_of_bitsandbytes(quant_type, double, shape):
    linear = linear4bit(*shape, quant_type=quant_type, double=double)
    assert linear.weight.quant_state.nested == double
    out = torch.full(shape, float("nan"))

    frozen.dequantize(linear.weight, out)

    assert torch.equal(out, dequantized(linear))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (50, 200), (1, 64)])
@pytest.mark.parametrize("rank", [16, 32])
def test_lora_is_added_to_the_dequantized_weights(double, shape, rank):
    """B is a part of a wider tensor, as in Projections."""
    linear = linear4bit(*shape, double=double)
    lora = frozen.Lora(random(rank, shape[1], seed=1), random(shape[0], 3 * rank, seed=2)[:, rank : 2 * rank])
    out = torch.full(shape, float("nan"))

    frozen.dequantize_and_add(linear.weight, lora, out)

    torch.testing.assert_close(out, dequantized(linear) + lora.b @ lora.a)


def test_frozen_products_are_those_of_the_stacked_weights():
    linears = [linear4bit(40, 128), linear4bit(24, 128, seed=1)]
    stacked = torch.cat([dequantized(linear) for linear in linears])
    stack = frozen.Frozen(linears, torch.float32)
    x, grad = random(9, 128, seed=2), random(9, 64, seed=3)
    lora = frozen.Lora(random(16, 128, seed=4), random(24, 16, seed=5))
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


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (40, 192), (130, 272)])  # one tile, parts of tiles
def test_weights_in_fp8_are_the_quantized_rows(shape, transposed, double):
    """`out` is a part of a larger tensor, as in a stack. At most one in a thousand rounds to the other neighbour."""
    linear = linear4bit(*shape, double=double)
    exact = dequantized(linear).t().contiguous() if transposed else dequantized(linear)
    expected = quantize(exact)
    stack = torch.zeros(exact.shape[0], exact.shape[1] + (16 if transposed else 0), dtype=FP8)
    out = stack[:, : exact.shape[1]]

    frozen.convert_to_fp8(linear.weight, present(expected.scale)[:, 0], out, transposed=transposed)

    differ = out.float() != present(expected.fp8).float()
    assert differ.float().mean() < 1e-3
    assert relative_error(out.float(), present(expected.fp8).float()) < 0.005
    assert stack[:, exact.shape[1] :].float().abs().sum() == 0


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
