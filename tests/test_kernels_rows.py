import pytest
import torch
from interpreted import cpu_kernels, present, random, relative_error  # noqa: F401

from pdf2lora.model.kernels.rmsnorm import add_rmsnorm, rmsnorm_backward_
from pdf2lora.model.kernels.rows import FP8, Format, Rows, block_and_warps, quantize
from pdf2lora.model.kernels.swiglu import swiglu, swiglu_backward_

pytestmark = pytest.mark.usefixtures("cpu_kernels")

ONLY_FP8 = Format(values=False, fp8=True)


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

    both, values, fp8 = (Rows.empty(like, 20, Format(v, f, 6)) for v, f in ((True, True), (True, False), (False, True)))

    assert [present(part).shape for part in (both.values, both.fp8, both.scale)] == [(3, 20), (3, 26), (3, 1)]
    assert (values.fp8, values.scale, fp8.values) == (None, None, None)
    assert (both.fp8_stride, values.fp8_stride) == (26, 0)


def test_a_part_of_rows_has_the_same_formats_and_knows_its_first_token():
    rows = quantize(random(5, 8))

    part = rows.part(slice(2, 4))

    assert part.first_token == 2
    for found, whole in zip(part[:3], rows[:3], strict=True):
        assert torch.equal(present(found).float(), present(whole)[2:4].float())
    assert Rows(None).part(slice(1, 2)) == Rows(None, first_token=1)


def test_rows_of_the_kernels_are_quantized_like_finished_rows():
    features = 100
    residual, weight, grad = random(5, features), random(features, seed=1), random(5, features, seed=2)
    gate_up = random(5, 2 * features, seed=3)
    _, plain, rstd = add_rmsnorm(residual, None, weight, 1e-5)
    dx = rmsnorm_backward_(grad.clone(), residual, rstd, weight, None).values
    d_gate_up = swiglu_backward_(grad, gate_up.clone()).values
    pairs = [
        (add_rmsnorm(residual, None, weight, 1e-5, ONLY_FP8)[1], plain.values),
        (rmsnorm_backward_(grad.clone(), residual, rstd, weight, None, ONLY_FP8), dx),
        (swiglu(gate_up, ONLY_FP8), swiglu(gate_up).values),
        (swiglu_backward_(grad, gate_up.clone(), ONLY_FP8), d_gate_up),
    ]

    for rows, values in pairs:
        expected = quantize(present(values))
        assert torch.equal(present(rows.fp8).view(torch.uint8), present(expected.fp8).view(torch.uint8))
        assert torch.equal(present(rows.scale), present(expected.scale))
    assert pairs[0][0].values is pairs[2][0].values is pairs[3][0].values is None


def test_columns_for_lora_follow_the_features():
    features = 100
    residual, weight, grad = random(5, features), random(features, seed=1), random(5, features, seed=2)
    gate_up = random(5, 2 * features, seed=3)
    _, _, rstd = add_rmsnorm(residual, None, weight, 1e-5)
    wide = ONLY_FP8._replace(lora_columns=48)

    def all_rows(format):
        yield add_rmsnorm(residual, None, weight, 1e-5, format)[1]
        yield rmsnorm_backward_(grad.clone(), residual, rstd, weight, None, format)
        yield swiglu(gate_up, format)
        yield swiglu_backward_(grad, gate_up.clone(), format)
        yield quantize(residual, format.lora_columns)

    for rows, narrow in zip(all_rows(wide), all_rows(ONLY_FP8), strict=True):
        fp8, expected = present(rows.fp8), present(narrow.fp8)
        assert fp8.shape == (5, expected.shape[1] + 48)
        assert torch.equal(fp8[:, :-48].float(), expected.float())
        assert torch.equal(present(rows.scale), present(narrow.scale))
