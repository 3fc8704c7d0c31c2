"""Products with frozen weights, in bfloat16 or in fp8. Projections that read the same x share one product.

A product of t tokens with n x k weights costs 2 t n k FLOP, and so does the gradient of x. Weights get no gradient.
- bfloat16: dequantizes the weights before a product. Moves 2.5 bytes per weight. LoRA's product B A can be added to the
  weights in float32, before their only rounding.
- fp8: converts the 4-bit weights to e4m3 before a product. A scale must not vary along the sum, so each direction has
  its own scales, which are computed once. Moves 1.5 bytes per weight and keeps no e4m3 weight in memory.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import FP8, Rows

LARGEST_FP8 = 448.0  # of e4m3
SMALLEST_FEATURE = 1e-12  # avoids a scale of zero
# The fastest tiles on one H200:
ADD_TILE = {"BLOCK_OUTPUTS": 64, "BLOCK_BYTES": 32, "num_warps": 4}
CONVERT_TILE = {"BLOCK_OUTPUTS": 64, "BLOCK_BYTES": 32, "num_warps": 2}


@triton.jit
def _steps(
    absmax, absmax_code, absmax_absmax, absmax_offset, block, exists,
    ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """The largest weight of each block of weights, float32."""
    if NESTED:
        step = tl.load(absmax_code + tl.load(absmax + block, mask=exists, other=0).to(tl.int32))
        step = step * tl.load(absmax_absmax + block // ABSMAX_BLOCKSIZE, mask=exists, other=0.0)
        step += tl.load(absmax_offset)
    else:
        step = tl.load(absmax + block, mask=exists, other=0.0)
    return step


@triton.jit
def _weights(packed, code, step, at, inside):
    """The two weights of each byte, float32, side by side in the last dimension. at: indices of bytes."""
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    return tl.interleave(tl.load(code + (byte >> 4)) * step, tl.load(code + (byte & 15)) * step)


@triton.jit
def _tile(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, num_outputs, num_inputs,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, IN_ONE_BLOCK: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """A program's weights, (outputs, features), float32, and its outputs and features.

    IN_ONE_BLOCK: the weights of each output have one step.
    """
    output = (tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    first_byte = tl.program_id(1) * BLOCK_BYTES
    byte = first_byte + tl.arange(0, BLOCK_BYTES)
    at = output[:, None] * (num_inputs // 2) + byte[None, :]
    exists = (output < num_outputs)[:, None]
    inside = exists & (byte < num_inputs // 2)[None, :]
    if IN_ONE_BLOCK:
        block = (output[:, None] * (num_inputs // 2) + first_byte) // (BLOCKSIZE // 2)
        step = _steps(absmax, absmax_code, absmax_absmax, absmax_offset, block, exists, ABSMAX_BLOCKSIZE, NESTED)
    else:
        block = at // (BLOCKSIZE // 2)
        step = _steps(absmax, absmax_code, absmax_absmax, absmax_offset, block, inside, ABSMAX_BLOCKSIZE, NESTED)
    return _weights(packed, code, step, at, inside), output, 2 * first_byte + tl.arange(0, 2 * BLOCK_BYTES)


@triton.jit
def _dequantize(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, out, num_bytes,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None]
    at = block * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    exists = block * (BLOCKSIZE // 2) < num_bytes
    step = _steps(absmax, absmax_code, absmax_absmax, absmax_offset, block, exists, ABSMAX_BLOCKSIZE, NESTED)
    both = _weights(packed, code, step, at, at < num_bytes)
    element = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out + element, both.to(out.dtype.element_ty), mask=element < 2 * num_bytes)


@triton.jit
def _dequantize_and_add(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, out, a, b, num_outputs, num_inputs, b_stride,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, IN_ONE_BLOCK: tl.constexpr,
    R: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    values, output, feature = _tile(
        packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, num_outputs, num_inputs,
        BLOCKSIZE, ABSMAX_BLOCKSIZE, NESTED, IN_ONE_BLOCK, BLOCK_OUTPUTS, BLOCK_BYTES,
    )  # fmt: skip
    rank = tl.arange(0, R)
    exists, within = (output < num_outputs)[:, None], (feature < num_inputs)[None, :]
    left = tl.load(b + output[:, None] * b_stride + rank[None, :], mask=exists, other=0.0)
    right = tl.load(a + rank[:, None].to(tl.int64) * num_inputs + feature[None, :], mask=within, other=0.0)
    values += tl.dot(left, right, input_precision="ieee")
    tl.store(
        out + output[:, None] * num_inputs + feature[None, :], values.to(out.dtype.element_ty), mask=exists & within
    )


@triton.jit
def _convert(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, out, scale, num_outputs, num_inputs, out_stride,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, IN_ONE_BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    values, output, feature = _tile(
        packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, num_outputs, num_inputs,
        BLOCKSIZE, ABSMAX_BLOCKSIZE, NESTED, IN_ONE_BLOCK, BLOCK_OUTPUTS, BLOCK_BYTES,
    )  # fmt: skip
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
    blocks = max(1, 2048 // constants["BLOCKSIZE"])
    _dequantize[(triton.cdiv(2 * num_bytes, blocks * constants["BLOCKSIZE"]),)](
        *tensors, out, num_bytes, **constants,
        BLOCKS=blocks, num_warps=4, enable_fp_fusion=False,  # rounds as bitsandbytes does
    )  # fmt: skip


def dequantize_and_add(weight: Any, lora: "Lora", out: Tensor) -> None:
    """dequantize() plus lora.b lora.a, in float32. out: contiguous, (features out, features in)."""
    tensors, constants = _arguments(weight)
    num_outputs, num_inputs = weight.quant_state.shape
    _dequantize_and_add[_grid(weight, ADD_TILE)](
        *tensors, out, lora.a, lora.b, num_outputs, num_inputs, lora.b.stride(0), **constants,
        IN_ONE_BLOCK=_is_in_one_block(weight, ADD_TILE), R=lora.a.shape[0], **ADD_TILE,
    )  # fmt: skip


def convert_to_fp8(weight: Any, scale: Tensor, out: Tensor, *, transposed: bool) -> None:
    """weight / scale in e4m3. weight: bitsandbytes' 4-bit weight, (features out, features in).

    scale: float32, one number per row of `out`. out: (features out, features in), or with `transposed` (features in,
    features out); the columns of a larger tensor if it is transposed.
    """
    tensors, constants = _arguments(weight)
    num_outputs, num_inputs = weight.quant_state.shape
    _convert[_grid(weight, CONVERT_TILE)](
        *tensors, out, scale, num_outputs, num_inputs, out.stride(0), **constants,
        IN_ONE_BLOCK=_is_in_one_block(weight, CONVERT_TILE), TRANSPOSED=transposed, **CONVERT_TILE,
    )  # fmt: skip


def _grid(weight: Any, tile: dict[str, int]) -> tuple[int, int]:
    num_outputs, num_inputs = weight.quant_state.shape
    return triton.cdiv(num_outputs, tile["BLOCK_OUTPUTS"]), triton.cdiv(num_inputs, 2 * tile["BLOCK_BYTES"])


def _is_in_one_block(weight: Any, tile: dict[str, int]) -> bool:
    """Whether the weights of a tile's row share a step: then it is read once, not for each byte."""
    num_inputs: int = weight.quant_state.shape[1]
    blocksize: int = weight.quant_state.blocksize
    return num_inputs % blocksize == 0 and blocksize % (2 * tile["BLOCK_BYTES"]) == 0


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


class Lora(NamedTuple):
    """LoRA of one weight. a: (rank, features in), contiguous; b: (features out, rank), times the scaling.

    rank: a power of two, at least 16.
    """

    a: Tensor
    b: Tensor


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
        magnitude = Weights(self).values.abs_()
        self.fp8_scales = Fp8Scales(
            *(magnitude.amax(dim).float().clamp_(min=SMALLEST_FEATURE) / LARGEST_FP8 for dim in (1, 0))
        )

    def forward(self, x: Rows, weights: "Weights", out: Tensor | None = None) -> Tensor:
        """x W^T + bias: (tokens, features in) -> (tokens, features out)."""
        if x.fp8 is not None:
            product = _product_fp8(x, weights.fp8_by_output, out)
            return product if self.bias is None else product.add_(self.bias)
        assert x.values is not None
        return self.add_bias(x.values, weights.values.t(), out)

    def add_bias(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """left right + bias; right: (any, features out)."""
        return torch.mm(left, right, out=out) if self.bias is None else torch.addmm(self.bias, left, right, out=out)

    def backward(self, grad: Rows, weights: "Weights", out: Tensor | None = None) -> Tensor:
        """grad W: (tokens, features out) -> (tokens, features in)."""
        if grad.fp8 is not None:
            return _product_fp8(grad, weights.fp8_by_input, out)
        assert grad.values is not None
        return torch.mm(grad.values, weights.values, out=out)


class Weights:
    """The stacked weights of a Frozen in the formats that products read, each converted at the first use.

    They exist as long as this object, so that several products can share them.
    """

    def __init__(self, frozen: Frozen, loras: Sequence[Lora | None] = ()):
        """loras: of each weight. Their products are added to `values`; fp8 would round them away."""
        self.frozen = frozen
        self.loras = loras

    @cached_property
    def values(self) -> Tensor:
        """Dequantized: (features out, features in)."""
        frozen = self.frozen
        weight = torch.empty(frozen.shape, dtype=frozen.dtype, device=frozen.linears[0].weight.device)
        for linear, part, lora in zip_longest(frozen.linears, weight.split(frozen.rows), self.loras):
            if lora is None:
                dequantize(linear.weight, part)
            else:
                dequantize_and_add(linear.weight, lora, part)
        return weight

    @cached_property
    def fp8_by_output(self) -> Rows:
        """(features out, features in), with a scale per row."""
        frozen = self.frozen
        assert frozen.fp8_scales is not None
        scale = frozen.fp8_scales.by_output
        out = torch.empty(frozen.shape, dtype=FP8, device=scale.device)
        parts = zip(frozen.linears, scale.split(frozen.rows), out.split(frozen.rows), strict=True)
        for linear, part_scale, part in parts:
            convert_to_fp8(linear.weight, part_scale, part, transposed=False)
        return Rows(None, out, scale[:, None])

    @cached_property
    def fp8_by_input(self) -> Rows:
        """Transposed: (features in, features out), with a scale per row."""
        frozen = self.frozen
        assert frozen.fp8_scales is not None
        scale = frozen.fp8_scales.by_input
        out = torch.empty(frozen.shape[::-1], dtype=FP8, device=scale.device)
        for linear, part in zip(frozen.linears, out.split(frozen.rows, dim=1), strict=True):
            convert_to_fp8(linear.weight, scale, part, transposed=True)
        return Rows(None, out, scale[:, None])


def _product_fp8(left: Rows, right: Rows, out: Tensor | None) -> Tensor:
    """left right^T times both scales, (rows of left, rows of right), bfloat16."""
    assert left.fp8 is not None
    assert left.scale is not None
    assert right.fp8 is not None
    assert right.scale is not None
    return torch._scaled_mm(
        left.fp8, right.fp8.t(), scale_a=left.scale, scale_b=right.scale.t(), out_dtype=torch.bfloat16,
        use_fast_accum=True, out=out,
    )  # fmt: skip
