"""Products with frozen weights, in bfloat16 or in fp8. Projections that read the same x share one product.

A product of t tokens with n x k weights costs 2 t n k FLOP, and so does the gradient of x. Weights get no gradient.
- bfloat16: dequantizes the weights before each product. Moves 2.5 bytes per weight.
- fp8: converts the 4-bit weights to e4m3 before each product. A scale must not vary along the sum, so each direction
  has its own scales, which are computed once. Moves 1.5 bytes per weight and keeps no e4m3 weight in memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import FP8, Rows

LARGEST_FP8 = 448.0  # of e4m3
SMALLEST_FEATURE = 1e-12  # avoids a scale of zero


@triton.jit
def _weights(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, at, inside,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """The two weights of each byte, float32, side by side in the last dimension. at: indices of bytes."""
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at // (BLOCKSIZE // 2)
    if NESTED:
        step = tl.load(absmax_code + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        step = step * tl.load(absmax_absmax + block // ABSMAX_BLOCKSIZE, mask=inside, other=0.0)
        step += tl.load(absmax_offset)
    else:
        step = tl.load(absmax + block, mask=inside, other=0.0)
    high = tl.load(code + (byte >> 4)) * step
    low = tl.load(code + (byte & 15)) * step
    return tl.interleave(high, low)


@triton.jit
def _dequantize(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, out, num_bytes,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    both = _weights(
        packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, at, at < num_bytes,
        BLOCKSIZE, ABSMAX_BLOCKSIZE, NESTED,
    )  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + element, both.to(out.dtype.element_ty), mask=element < 2 * num_bytes)


@triton.jit
def _convert(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, out, scale, num_outputs, num_inputs, out_stride,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    output = (tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    at = output[:, None] * (num_inputs // 2) + byte[None, :]
    inside = (output < num_outputs)[:, None] & (byte < num_inputs // 2)[None, :]
    values = _weights(
        packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, at, inside,
        BLOCKSIZE, ABSMAX_BLOCKSIZE, NESTED,
    )  # fmt: skip
    feature = tl.program_id(1) * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)
    if TRANSPOSED:
        factor = 1.0 / tl.load(scale + feature, mask=feature < num_inputs, other=1.0)
        values = tl.trans(values * factor[None, :])
        to = feature.to(tl.int64)[:, None] * out_stride + output[None, :]
        exists = (feature < num_inputs)[:, None] & (output < num_outputs)[None, :]
    else:
        factor = 1.0 / tl.load(scale + output, mask=output < num_outputs, other=1.0)
        values = values * factor[:, None]
        to = output[:, None] * out_stride + feature[None, :]
        exists = (output < num_outputs)[:, None] & (feature < num_inputs)[None, :]
    tl.store(out + to, values.to(out.dtype.element_ty), mask=exists)


def dequantize(weight: Any, out: Tensor) -> None:
    """Dequantizes bitsandbytes' 4-bit weight (Params4bit, with or without double quantization) into `out`.

    out: contiguous, as many elements as the weight. The result equals bitsandbytes' dequantize_4bit, which needs four
    launches and twice the time.
    """
    tensors, constants = _arguments(weight)
    num_bytes = weight.data.numel()
    _dequantize[(triton.cdiv(num_bytes, 1024),)](
        *tensors, out, num_bytes, **constants,
        BLOCK=1024, num_warps=4, enable_fp_fusion=False,  # rounds as bitsandbytes does
    )  # fmt: skip


def convert_to_fp8(weight: Any, scale: Tensor, out: Tensor, *, transposed: bool) -> None:
    """weight / scale in e4m3. weight: bitsandbytes' 4-bit weight, (features out, features in).

    scale: float32, one number per row of `out`. out: (features out, features in), or with `transposed` (features in,
    features out); the columns of a larger tensor if it is transposed.
    """
    tensors, constants = _arguments(weight)
    num_outputs, num_inputs = weight.quant_state.shape
    grid = triton.cdiv(num_outputs, 64), triton.cdiv(num_inputs, 64)
    _convert[grid](
        *tensors, out, scale, num_outputs, num_inputs, out.stride(0), **constants,
        TRANSPOSED=transposed, BLOCK_OUTPUTS=64, BLOCK_BYTES=32, num_warps=2,  # the fastest tile on one H200
    )  # fmt: skip


def _arguments(weight: Any) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The arguments of _weights for bitsandbytes' Params4bit."""
    state = weight.quant_state
    nested = state.state2 if state.nested else None
    second = (nested.code, nested.absmax, state.offset) if nested else (None, None, None)
    constants = {
        "BLOCKSIZE": state.blocksize,
        "ABSMAX_BLOCKSIZE": nested.blocksize if nested else 1,
        "NESTED": nested is not None,
    }
    return (weight.data, state.code, state.absmax, *second), constants


class Fp8Scales(NamedTuple):
    """Of the stacked weights. by_output: (features out,), float32; by_input: (features in,), float32."""

    by_output: Tensor
    by_input: Tensor


class Frozen:
    """The weights of one or more bitsandbytes Linear4bit, stacked: (features out, features in), and their biases."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype):
        self.linears = linears
        self.dtype = dtype
        self.rows = [linear.out_features for linear in linears]
        self.shape = (sum(self.rows), linears[0].in_features)
        self.fp8_scales: Fp8Scales | None = None
        self.bias: Tensor | None = None  # (features out,); zeros for a layer without a bias
        if any(linear.bias is not None for linear in linears):
            weight = linears[0].weight
            self.bias = torch.zeros(self.shape[0], dtype=dtype, device=weight.device)
            for linear, part in zip(linears, self.bias.split(self.rows), strict=True):
                if linear.bias is not None:
                    part.copy_(linear.bias.detach())

    def compute_fp8_scales(self) -> None:
        """Once, before the first product of Rows with fp8."""
        magnitude = self.weight().abs_()
        self.fp8_scales = Fp8Scales(
            *(magnitude.amax(dim).float().clamp_(min=SMALLEST_FEATURE) / LARGEST_FP8 for dim in (1, 0))
        )

    def weight(self) -> Tensor:
        """The stacked weights, dequantized."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.linears[0].weight.device)
        for linear, part in zip(self.linears, weight.split(self.rows), strict=True):
            dequantize(linear.weight, part)
        return weight

    def forward(self, x: Rows) -> Tensor:
        """x W^T + bias: (tokens, features in) -> (tokens, features out)."""
        if x.fp8 is not None:
            product = _product_fp8(x, self._fp8_by_output())
            return product if self.bias is None else product.add_(self.bias)
        assert x.values is not None
        return self.add_bias(x.values, self.weight().t())

    def add_bias(self, left: Tensor, right: Tensor) -> Tensor:
        """left right + bias; right: (any, features out)."""
        return left @ right if self.bias is None else torch.addmm(self.bias, left, right)

    def backward(self, grad: Rows) -> Tensor:
        """grad W: (tokens, features out) -> (tokens, features in)."""
        if grad.fp8 is not None:
            return _product_fp8(grad, self._fp8_by_input())
        assert grad.values is not None
        return grad.values @ self.weight()

    def _fp8_by_output(self) -> Rows:
        """The stacked weights in e4m3, (features out, features in), with a scale per row."""
        assert self.fp8_scales is not None
        scale = self.fp8_scales.by_output
        out = torch.empty(self.shape, dtype=FP8, device=scale.device)
        parts = zip(self.linears, scale.split(self.rows), out.split(self.rows), strict=True)
        for linear, part_scale, part in parts:
            convert_to_fp8(linear.weight, part_scale, part, transposed=False)
        return Rows(None, out, scale[:, None])

    def _fp8_by_input(self) -> Rows:
        """The transposed stacked weights in e4m3, (features in, features out), with a scale per row."""
        assert self.fp8_scales is not None
        scale = self.fp8_scales.by_input
        out = torch.empty(self.shape[::-1], dtype=FP8, device=scale.device)
        for linear, part in zip(self.linears, out.split(self.rows, dim=1), strict=True):
            convert_to_fp8(linear.weight, scale, part, transposed=True)
        return Rows(None, out, scale[:, None])


def _product_fp8(left: Rows, right: Rows) -> Tensor:
    """left right^T times both scales, (rows of left, rows of right), bfloat16."""
    assert left.fp8 is not None
    assert left.scale is not None
    assert right.fp8 is not None
    assert right.scale is not None
    return torch._scaled_mm(
        left.fp8, right.fp8.t(), scale_a=left.scale, scale_b=right.scale.t(), out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
