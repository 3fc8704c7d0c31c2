"""bitsandbytes' 4-bit weights, dequantized or converted to fp8 while they are in registers.

Each block of weights has a step, its largest absolute value. With double quantization the steps are stored in 8 bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# The fastest tiles on one H200:
ADD_TILE = {"BLOCK_OUTPUTS": 64, "BLOCK_BYTES": 32, "num_warps": 4}
CONVERT_TILE = {"BLOCK_OUTPUTS": 64, "BLOCK_BYTES": 32, "num_warps": 2}


class Lora(NamedTuple):
    """LoRA of one weight. a: (rank, features in), contiguous; b: (features out, rank), times the scaling.

    rank: a power of two, at least 16.
    """

    a: Tensor
    b: Tensor


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
        block, has_step = (output[:, None] * (num_inputs // 2) + first_byte) // (BLOCKSIZE // 2), exists
    else:
        block, has_step = at // (BLOCKSIZE // 2), inside
    step = _steps(absmax, absmax_code, absmax_absmax, absmax_offset, block, has_step, ABSMAX_BLOCKSIZE, NESTED)
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


def dequantize_and_add(weight: Any, lora: Lora, out: Tensor) -> None:
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
    """True if each row of a tile has one step. The kernel then reads it once, and not for each byte."""
    num_inputs: int = weight.quant_state.shape[1]
    blocksize: int = weight.quant_state.blocksize
    return num_inputs % blocksize == 0 and blocksize % (2 * tile["BLOCK_BYTES"]) == 0


def _arguments(weight: Any) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The first arguments of the kernels for bitsandbytes' Params4bit, and their constants."""
    state = weight.quant_state
    nested = state.state2 if state.nested else None
    second = (nested.code, nested.absmax, state.offset) if nested else (None, None, None)
    constants = {
        "BLOCKSIZE": state.blocksize,
        "ABSMAX_BLOCKSIZE": nested.blocksize if nested else 1,
        "NESTED": nested is not None,
    }
    return (weight.data, state.code, state.absmax, *second), constants
