"""Activations and gradients as rows, (tokens, features), and their rowwise quantization to fp8.

The scale of a row is its largest absolute value divided by 448, the largest number of e4m3 (Micikevicius et al. 2022,
FP8 Formats for Deep Learning). Products multiply by the scales. Kernels of this folder quantize rows in registers;
`quantize` is for rows that another library computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn


class Format(NamedTuple):
    """The tensors of Rows that a kernel writes. lora_columns: columns of fp8 after the features, for fp8_lora.py."""

    values: bool = True
    fp8: bool = False
    lora_columns: int = 0


VALUES = Format()


class Rows(NamedTuple):
    """The left side of a product: `values` for LoRA, `fp8` and `scale` for the frozen weights. Either may be None.

    values: (tokens, features), bfloat16; fp8: (tokens, features + lora_columns), e4m3; scale: (tokens, 1), float32.
    first_token: index of the first row in the micro-batch; it selects the dropout mask.
    """

    values: Tensor | None
    fp8: Tensor | None = None
    scale: Tensor | None = None
    first_token: int = 0

    def part(self, tokens: slice) -> "Rows":
        """Views of some rows of a whole micro-batch."""
        values, fp8, scale = (tensor if tensor is None else tensor[tokens] for tensor in self[:3])
        return Rows(values, fp8, scale, tokens.start)

    @classmethod
    def empty(cls, like: Tensor, num_features: int, format: Format) -> "Rows":
        tokens, on = like.shape[0], like.device
        return cls(
            torch.empty(tokens, num_features, dtype=like.dtype, device=on) if format.values else None,
            torch.empty(tokens, num_features + format.lora_columns, dtype=FP8, device=on) if format.fp8 else None,
            torch.empty(tokens, 1, dtype=torch.float32, device=on) if format.fp8 else None,
        )

    @property
    def fp8_stride(self) -> int:
        """From one row of fp8 to the next."""
        return 0 if self.fp8 is None else self.fp8.stride(0)


def block_and_warps(num_features: int) -> tuple[int, int]:
    """Triton's block size for one row per program, and the number of warps that hold it without register spills."""
    block = triton.next_power_of_2(num_features)
    return block, min(max(block // 512, 4), 32)


@triton.jit
def store_fp8(values, fp8, scale, row, columns, fp8_stride, inside):
    """Quantizes one row (float32 `values`, 0 outside of `inside`) into fp8[row] and scale[row]."""
    largest = tl.maximum(tl.max(tl.abs(values), 0), 1e-12)
    tl.store(fp8 + row * fp8_stride + columns, (values * (448.0 / largest)).to(fp8.dtype.element_ty), mask=inside)
    tl.store(scale + row, largest / 448.0)


@triton.jit
def _quantize(values, fp8, scale, num_features, fp8_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_features
    loaded = tl.load(values + row * num_features + columns, mask=inside, other=0.0).to(tl.float32)
    store_fp8(loaded, fp8, scale, row, columns, fp8_stride, inside)


def quantize(values: Tensor, lora_columns: int = 0) -> Rows:
    """values: (tokens, features), contiguous. Moves 3 bytes per feature."""
    tokens, features = values.shape
    rows = Rows.empty(values, features, Format(False, True, lora_columns))
    block, warps = block_and_warps(features)
    _quantize[(tokens,)](values, rows.fp8, rows.scale, features, rows.fp8_stride, BLOCK=block, num_warps=warps)
    return rows._replace(values=values)


def as_rows(values: Tensor, format: Format) -> Rows:
    """Rows of another library's result. They always have the values."""
    return quantize(values, format.lora_columns) if format.fp8 else Rows(values)
