"""Products with frozen weights, in bfloat16 or in fp8. Projections that read the same x share one product.

A product of t tokens with n x k weights costs 2 t n k FLOP, and so does the gradient of x. Weights get no gradient.
- bfloat16: dequantizes the weights before a product. Moves 2.5 bytes per weight. LoRA's product B A can be added to the
  weights in float32, before their only rounding.
- fp8: converts the 4-bit weights to e4m3 before a product. A scale must not vary along the sum, so each direction has
  its own scales, which are computed once. Moves 1.5 bytes per weight and keeps no e4m3 weight in memory. LoRA's product
  can be a part of it (fp8_lora.py).
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor

from pdf2lora.model.kernels.dequantize import Lora, convert_to_fp8, dequantize, dequantize_and_add
from pdf2lora.model.kernels.fp8_lora import LoraColumns, append_to_weights, num_columns
from pdf2lora.model.kernels.rows import FP8, Rows

LARGEST_FP8 = 448.0  # of e4m3
SMALLEST_FEATURE = 1e-12  # avoids a scale of zero


class Fp8Scales(NamedTuple):
    """Of the stacked weights. by_output: (features out,), float32; by_input: (features in,), float32."""

    by_output: Tensor
    by_input: Tensor


class Frozen:
    """The weights of one or more linear layers, stacked: (features out, features in), and their biases.

    The layers are bitsandbytes' Linear4bit, or torch's Linear for a forward pass without LoRA.
    """

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

    def __init__(
        self,
        frozen: Frozen,
        loras: Sequence[Lora | None] = (),
        *,
        output_columns: LoraColumns | None = None,
        input_columns: LoraColumns | None = None,
    ):
        """loras: of each weight. Their products are added to `values`; fp8 would round them away.

        output_columns, input_columns: LoRA's columns, appended to fp8_by_output and fp8_by_input.
        """
        self.frozen = frozen
        self.loras = loras
        self.output_columns, self.input_columns = output_columns, input_columns

    @cached_property
    def values(self) -> Tensor:
        """Dequantized: (features out, features in)."""
        frozen = self.frozen
        weight = torch.empty(frozen.shape, dtype=frozen.dtype, device=frozen.linears[0].weight.device)
        for linear, part, lora in zip_longest(frozen.linears, weight.split(frozen.rows), self.loras):
            if not isinstance(linear, bnb.nn.Linear4bit):
                part.copy_(linear.weight)
            elif lora is None:
                dequantize(linear.weight, part)
            else:
                dequantize_and_add(linear.weight, lora, part)
        return weight

    @cached_property
    def fp8_by_output(self) -> Rows:
        """(features out, features in + LoRA's columns), with a scale per row."""
        return self._fp8(self.output_columns, transposed=False)

    @cached_property
    def fp8_by_input(self) -> Rows:
        """Transposed: (features in, features out + LoRA's columns), with a scale per row."""
        return self._fp8(self.input_columns, transposed=True)

    def _fp8(self, lora: LoraColumns | None, *, transposed: bool) -> Rows:
        scales, rows = self.frozen.fp8_scales, self.frozen.rows
        assert scales is not None
        scale, shape = (
            (scales.by_input, self.frozen.shape[::-1]) if transposed else (scales.by_output, self.frozen.shape)
        )
        columns = num_columns(lora.matrix.shape[1]) if lora else 0
        fp8 = torch.empty(shape[0], shape[1] + columns, dtype=FP8, device=scale.device)
        if lora is not None:
            scale = append_to_weights(lora, scale, fp8)
        parts = fp8[:, : shape[1]].split(rows, dim=int(transposed))
        scale_parts = [scale] * len(rows) if transposed else scale.split(rows)
        for linear, part_scale, part in zip(self.frozen.linears, scale_parts, parts, strict=True):
            convert_to_fp8(linear.weight, part_scale, part, transposed=transposed)
        return Rows(None, fp8, scale[:, None])


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
