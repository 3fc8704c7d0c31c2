"""Helpers of the tests that run the kernels on a CPU: Triton's interpreter in float32, and PyTorch's attention.

conftest.py turns the interpreter on without a CUDA driver. With a driver, use `TRITON_INTERPRET=1 python -m pytest`.
"""

import os
from typing import TypeVar

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import triton.language as tl
from torch.nn import functional
from triton.runtime import interpreter

from pdf2lora.model.kernels import attention, lora
from pdf2lora.model.kernels.rows import FP8

needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu.py tests them")
T = TypeVar("T")
NEAR = 1e-5  # relative, in float32


def convert_float(values, source, target, rounding_mode, original=interpreter._convert_float):
    """Triton 3.7.1's interpreter loses the carry of a mantissa that it rounds up: 124.3 becomes 64 in e4m3."""
    if (source, target) == (tl.float32, tl.float8e4nv):
        return torch.from_numpy(values.view(np.float32)).to(FP8).view(torch.uint8).numpy()
    return original(values, source, target, rounding_mode)


def call_device_function(function, *args, **kwargs):
    """Patches Triton's language once. Triton does so in each call of a device function: a quarter of the time."""
    if tl.core.is_builtin(tl.core.load):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


@pytest.fixture
def cpu_kernels(monkeypatch):
    """No GPU, small tiles of tokens (the interpreter also computes empty tiles), PyTorch's attention on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lora, "TOKENS_OF_A_SPLIT", 64)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_device_function)
    # By default it looks for overflows in all integer sums and products, and reports none: `debug` is off.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(attention, "forward", attention_forward)
    monkeypatch.setattr(attention, "backward", attention_backward)


def attention_forward(parts, heads):
    """PyTorch's attention. The context is its autograd graph."""
    with torch.enable_grad():
        query, key, value = (part.detach().requires_grad_() for part in parts)
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attention.Attended(output.detach(), False, (output, (query, key, value)))


def attention_backward(grad, parts, attended, heads):
    output, leaves = attended.context
    by_head = grad.view(-1, heads.seq_length, heads.num_queries, heads.head_dim).transpose(1, 2)
    return torch.autograd.grad(output, leaves, by_head)


def present(value: T | None) -> T:
    assert value is not None
    return value


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def scaled_product(left, right):
    """_scaled_mm without the rounding to bfloat16. The CPU's kernel does not support rowwise scales."""
    return (left.fp8.float() * left.scale) @ (right.fp8.float() * right.scale).t()


def linear4bit(out_features, in_features, *, quant_type="nf4", double=True, bias=False, seed=0):
    linear = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias, quant_type=quant_type, compress_statistics=double,
        compute_dtype=torch.float32,
    )  # fmt: skip
    linear.weight = bnb.nn.Params4bit(
        random(out_features, in_features, seed=seed), quant_type=quant_type, compress_statistics=double,
        requires_grad=False, module=linear,
    )  # fmt: skip
    return linear.to("cpu")
