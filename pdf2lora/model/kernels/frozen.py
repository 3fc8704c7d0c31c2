"""Products with frozen weights, in bfloat16 or in fp8. Projections that read the same x share one product.

A product of t tokens with n x k weights costs 2 t n k FLOP, and so does the gradient of x. Weights get no gradient.
- bfloat16: dequantizes the weights before each product. Moves 2.5 bytes per weight.
- fp8: quantizes the weights once for each direction, because a scale must not vary along the sum. Holds 2 bytes per
  weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import Rows, quantize


@triton.jit
def _dequantize(
    packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, out, num_bytes,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_bytes
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
    both = tl.interleave(high, low)
    element = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + element, both.to(out.dtype.element_ty), mask=element < 2 * num_bytes)


def dequantize(weight: Any, out: Tensor) -> None:
    """Dequantizes bitsandbytes' 4-bit weight (Params4bit, with or without double quantization) into `out`.

    out: contiguous, as many elements as the weight. The result equals bitsandbytes' dequantize_4bit, which needs four
    launches and twice the time.
    """
    state = weight.quant_state
    num_bytes = weight.data.numel()
    nested = state.state2 if state.nested else None
    _dequantize[(triton.cdiv(num_bytes, 1024),)](
        weight.data, state.code, state.absmax,
        nested and nested.code, nested and nested.absmax, state.offset if nested else None, out, num_bytes,
        BLOCKSIZE=state.blocksize, ABSMAX_BLOCKSIZE=nested.blocksize if nested else 1, NESTED=nested is not None,
        BLOCK=1024, num_warps=4, enable_fp_fusion=False,  # rounds as bitsandbytes does
    )  # fmt: skip


class Frozen:
    """The weights of one or more bitsandbytes Linear4bit, stacked: (features out, features in), and their biases."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype):
        self.linears = linears
        self.dtype = dtype
        self.rows = [linear.out_features for linear in linears]
        self.shape = (sum(self.rows), linears[0].in_features)
        self.fp8: tuple[Rows, Rows] | None = None
        self.bias: Tensor | None = None  # (features out,); zeros for a layer without
        if any(linear.bias is not None for linear in linears):
            weight = linears[0].weight
            self.bias = torch.zeros(self.shape[0], dtype=dtype, device=weight.device)
            for linear, part in zip(linears, self.bias.split(self.rows), strict=True):
                if linear.bias is not None:
                    part.copy_(linear.bias.detach())

    def to_fp8(self) -> None:
        """Quantizes the weights for both directions. Products of Rows with fp8 use them."""
        weight = self.weight()
        forward, backward = quantize(weight), quantize(weight.t().contiguous())
        self.fp8 = forward._replace(values=None), backward._replace(values=None)

    def weight(self) -> Tensor:
        """The stacked weights, dequantized."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.linears[0].weight.device)
        for linear, part in zip(self.linears, weight.split(self.rows), strict=True):
            dequantize(linear.weight, part)
        return weight

    def forward(self, x: Rows) -> Tensor:
        """x W^T + bias: (tokens, features in) -> (tokens, features out)."""
        if x.fp8 is not None:
            assert self.fp8 is not None
            product = _product_fp8(x, self.fp8[0])
            return product if self.bias is None else product.add_(self.bias)
        assert x.values is not None
        return self.add_bias(x.values, self.weight().t())

    def add_bias(self, left: Tensor, right: Tensor) -> Tensor:
        """left right + bias; right: (any, features out)."""
        return left @ right if self.bias is None else torch.addmm(self.bias, left, right)

    def backward(self, grad: Rows) -> Tensor:
        """grad W: (tokens, features out) -> (tokens, features in)."""
        if grad.fp8 is not None:
            assert self.fp8 is not None
            return _product_fp8(grad, self.fp8[1])
        assert grad.values is not None
        return grad.values @ self.weight()


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
