"""SwiGLU, silu(gate) * up (Shazeer 2020, GLU Variants), between the products of an MLP.

Memory bandwidth limits it. The docstrings count the bytes per feature, with two bytes for a bfloat16. The
arithmetic is in float32 and rounds once at the end; transformers rounds after each step.
"""

import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import FP8, VALUES, Format, Rows, block_and_warps, store_fp8


@triton.jit
def _swiglu(
    gate_up, values, fp8, scale, width, fp8_stride, VALUES: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    if VALUES:
        tl.store(values + row * width + columns, y.to(values.dtype.element_ty), mask=inside)
    if FP8:
        store_fp8(y, fp8, scale, row, columns, fp8_stride, inside)


def swiglu(gate_up: Tensor, format: Format = VALUES) -> Rows:
    """silu(gate) * up: (tokens, 2 * width), gate before up -> (tokens, width).

    Reads 4 bytes per feature of the result and writes 2.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = Rows.empty(gate_up, width, format)
    block, warps = block_and_warps(width)
    _swiglu[(tokens,)](
        gate_up, product.values, product.fp8, product.scale, width, product.fp8_stride,
        VALUES=format.values, FP8=format.fp8, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return product


@triton.jit
def _swiglu_backward(
    grad, gate_up, fp8, scale, width, fp8_stride,
    VALUES: tl.constexpr, FP8: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * 2 * width + columns
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_up = g * silu
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    if RESULT:
        tl.store(grad + row * width + columns, (silu * up).to(grad.dtype.element_ty), mask=inside)
    if VALUES:
        tl.store(gate_up + at, d_gate.to(gate_up.dtype.element_ty), mask=inside)
        tl.store(gate_up + at + width, d_up.to(gate_up.dtype.element_ty), mask=inside)
    if FP8:
        largest = tl.maximum(tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), 0), 1e-12)
        steps = 448.0 / largest
        to = row * fp8_stride + columns
        tl.store(fp8 + to, (d_gate * steps).to(fp8.dtype.element_ty), mask=inside)
        tl.store(fp8 + to + width, (d_up * steps).to(fp8.dtype.element_ty), mask=inside)
        tl.store(scale + row, largest / 448.0)


def swiglu_backward_(grad: Tensor, gate_up: Tensor, format: Format = VALUES, *, result: bool = False) -> Rows:
    """Gradient of (gate, up) from the gradient of silu(gate) * up. Overwrites `gate_up` with the values.

    grad: (tokens, width); gate_up: (tokens, 2 * width). Reads 6 bytes per feature of grad and writes 4.
    result: overwrites `grad` with silu(gate) * up, for 2 more bytes. Without it and without columns for LoRA, fp8
    overwrites `grad`: its row of gate and up takes the bytes of a row of grad, and the kernel has read the row before
    it writes.
    """
    tokens, width = grad.shape
    takes_memory_of_grad = format.fp8 and not format.lora_columns and not result and grad.element_size() == 2
    both = Rows.empty(gate_up, 0 if takes_memory_of_grad else 2 * width, format._replace(values=False))
    if takes_memory_of_grad:
        both = both._replace(fp8=grad.view(FP8))
    block, warps = block_and_warps(width)
    _swiglu_backward[(tokens,)](
        grad, gate_up, both.fp8, both.scale, width, both.fp8_stride,
        VALUES=format.values, FP8=format.fp8, RESULT=result, BLOCK=block, num_warps=min(2 * warps, 32),
    )  # fmt: skip
    return both._replace(values=gate_up if format.values else None)
