"""RMSNorm and its residual add, between two matrix products.

Memory bandwidth limits it. The docstrings count the bytes per feature, with two bytes for a bfloat16. The
arithmetic is in float32 and rounds once at the end; transformers rounds after each step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import VALUES, Format, Rows, block_and_warps, store_fp8


@triton.jit
def _add_rmsnorm(
    residual, update, weight, total, values, fp8, scale, rstd, num_features, fp8_stride, eps,
    ADD: tl.constexpr, VALUES: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_features
    at = row * num_features + columns
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / num_features + eps)
    tl.store(rstd + row, inverse)
    y = x * inverse * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if VALUES:
        tl.store(values + at, y.to(values.dtype.element_ty), mask=inside)
    if FP8:
        store_fp8(y, fp8, scale, row, columns, fp8_stride, inside)


def add_rmsnorm(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, format: Format = VALUES
) -> tuple[Tensor, Rows, Tensor]:
    """(residual + update, its RMSNorm times weight, 1 / RMS). Without an update the first is `residual` itself.

    residual, update: (tokens, features); weight: (features,); 1 / RMS: (tokens,), float32. Reads 4 bytes per feature
    and writes 4 (Zhang and Sennrich 2019, Root Mean Square Layer Normalization).
    """
    tokens, features = residual.shape
    total = residual if update is None else torch.empty_like(residual)
    normed = Rows.empty(residual, features, format)
    rstd = torch.empty(tokens, dtype=torch.float32, device=residual.device)
    block, warps = block_and_warps(features)
    _add_rmsnorm[(tokens,)](
        residual, update, weight, total, normed.values, normed.fp8, normed.scale, rstd, features, normed.fp8_stride,
        eps,
        ADD=update is not None, VALUES=format.values, FP8=format.fp8, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return total, normed, rstd


@triton.jit
def _rmsnorm_backward(
    grad, x, rstd, weight, residual_grad, fp8, scale, num_features, fp8_stride,
    ADD_RESIDUAL: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_features
    at = row * num_features + columns
    inverse = tl.load(rstd + row)
    direction = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dx = inverse * (g - direction * (tl.sum(g * direction, 0) / num_features))
    if ADD_RESIDUAL:
        dx += tl.load(residual_grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=inside)
    if FP8:
        store_fp8(dx, fp8, scale, row, columns, fp8_stride, inside)


def rmsnorm_backward_(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual_grad: Tensor | None, format: Format = VALUES
) -> Rows:
    """Gradient of x from the gradient of its RMSNorm, plus the gradient of the residual path. Overwrites `grad`.

    grad, x, residual_grad: (tokens, features). Reads 6 bytes per feature and writes 2. The weight is frozen and gets no
    gradient.
    """
    tokens, features = x.shape
    quantized = Rows.empty(x, features, format._replace(values=False))
    block, warps = block_and_warps(features)
    _rmsnorm_backward[(tokens,)](
        grad, x, rstd, weight, residual_grad, quantized.fp8, quantized.scale, features, quantized.fp8_stride,
        ADD_RESIDUAL=residual_grad is not None, FP8=format.fp8, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return quantized._replace(values=grad)
