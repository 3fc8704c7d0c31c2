import pytest
import torch
from interpreted import cpu_kernels, needs_interpreter, present, random, relative_error  # noqa: F401

from pdf2lora.model.kernels.rows import FP8, Rows, block_and_warps, quantize

pytestmark = [needs_interpreter, pytest.mark.usefixtures("cpu_kernels")]


@pytest.mark.parametrize(("num_features", "expected"), [(1, (1, 4)), (96, (128, 4)), (3072, (4096, 8)), (2**15, None)])
def test_a_row_is_one_block(num_features, expected):
    block, warps = block_and_warps(num_features)

    assert (block, warps) == (expected or (2**15, 32))


def test_fp8_is_the_nearest_e4m3_number_at_the_scale_of_the_row():
    values = random(5, 100) * torch.tensor([1e-3, 1.0, 300.0, 1e5, 0.0])[:, None]

    rows = quantize(values)
    fp8, scale = present(rows.fp8), present(rows.scale)

    largest = values.abs().amax(dim=1, keepdim=True)
    assert (fp8.dtype, scale.dtype) == (FP8, torch.float32)
    assert rows.values is values
    torch.testing.assert_close(scale, largest.clamp(min=1e-12) / 448)
    dequantized = fp8.float() * scale
    error = (dequantized - values).abs()
    assert (error <= torch.maximum(values.abs() * 2**-4, scale * 2**-10) * 1.001).all()  # 3 bits; subnormal steps
    assert fp8.float()[:4].abs().amax(dim=1).tolist() == [448] * 4  # uses the whole range
    assert 0.01 < relative_error(dequantized, values) < 0.04


def test_rows_have_the_requested_formats():
    like = torch.empty(3, 8)

    both, values, fp8 = (Rows.empty(like, 20, values=v, fp8=f) for v, f in ((True, True), (True, False), (False, True)))

    assert tuple(present(part).shape for part in both) == ((3, 20), (3, 20), (3, 1))
    assert (values.fp8, values.scale, fp8.values) == (None, None, None)
