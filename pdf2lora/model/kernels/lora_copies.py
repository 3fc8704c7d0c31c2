"""Copies of PEFT's float32 matrices A and B in compute precision, which the products read.

The forward pass makes them again, because the optimizer has changed the matrices. One launch copies both matrices of a
projection: with one sequence in a micro-batch, the time of a launch counts.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _copy_lora(a, b, a_copy, b_copy, scaling, num_a, num_b, r, b_copy_stride, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    blocks_of_a = tl.cdiv(num_a, BLOCK)
    if block < blocks_of_a:
        at = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(a + at, mask=at < num_a, other=0.0)
        tl.store(a_copy + at, values.to(a_copy.dtype.element_ty), mask=at < num_a)
    else:
        at = (block - blocks_of_a) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(b + at, mask=at < num_b, other=0.0) * scaling
        to = b_copy + at // r * b_copy_stride + at % r
        tl.store(to, values.to(b_copy.dtype.element_ty), mask=at < num_b)


def copy_lora(a: Tensor, b: Tensor, scaling: float, a_copy: Tensor, b_copy: Tensor) -> None:
    """Writes A to `a_copy` and scaling * B to `b_copy`.

    a: (r, features in); b: (features out, r); float32, contiguous. a_copy: at least r rows, contiguous. b_copy: at
    least r columns, last stride 1. Other rows and columns keep their values.
    """
    blocks = triton.cdiv(a.numel(), BLOCK) + triton.cdiv(b.numel(), BLOCK)
    _copy_lora[(blocks,)](
        a, b, a_copy, b_copy, scaling, a.numel(), b.numel(), b.shape[1], b_copy.stride(0), BLOCK=BLOCK
    )
