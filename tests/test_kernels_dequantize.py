import bitsandbytes as bnb
import pytest
import torch
from interpreted import cpu_kernels, dequantized, linear4bit, present, random, relative_error  # noqa: F401

from pdf2lora.model.kernels.dequantize import Lora, convert_to_fp8, dequantize, dequantize_and_add
from pdf2lora.model.kernels.rows import FP8, quantize

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(320, 128), (50, 200), (1, 64)])  # 640 blocks of 64, 156.25 and one
def test_dequantized_weights_are_those_of_bitsandbytes(quant_type, double, shape):
    linear = linear4bit(*shape, quant_type=quant_type, double=double)
    assert linear.weight.quant_state.nested == double
    out = torch.full(shape, float("nan"))

    dequantize(linear.weight, out)

    assert torch.equal(out, bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (50, 200), (1, 64)])
@pytest.mark.parametrize("rank", [16, 32])
def test_lora_is_added_to_the_dequantized_weights(double, shape, rank):
    """B is a part of a wider tensor, as in Projections."""
    linear = linear4bit(*shape, double=double)
    lora = Lora(random(rank, shape[1], seed=1), random(shape[0], 3 * rank, seed=2)[:, rank : 2 * rank])
    out = torch.full(shape, float("nan"))

    dequantize_and_add(linear.weight, lora, out)

    torch.testing.assert_close(out, dequantized(linear) + lora.b @ lora.a)


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

    convert_to_fp8(linear.weight, present(expected.scale)[:, 0], out, transposed=transposed)

    differ = out.float() != present(expected.fp8).float()
    assert differ.float().mean() < 1e-3
    assert relative_error(out.float(), present(expected.fp8).float()) < 0.005
    assert stack[:, exact.shape[1] :].float().abs().sum() == 0
