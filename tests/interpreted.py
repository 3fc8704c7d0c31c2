"""Helpers of the tests that run the kernels on a CPU: Triton's interpreter in float32, and PyTorch's attention.

conftest.py turns the interpreter on, except for `pytest -m gpu`.
"""

import math
from functools import cache
from typing import TypeVar

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import triton.language as tl
from torch.nn import functional
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from pdf2lora.model.kernels import attention, fp8_lora, lora
from pdf2lora.model.kernels.rows import FP8

T = TypeVar("T")
NEAR = 1e-5  # relative, in float32
numpy_dtype = cache(interpreter._get_np_dtype)


def convert_float(values, source, target, rounding_mode, original=interpreter._convert_float):
    """Triton 3.7.1's interpreter loses the carry of a mantissa that it rounds up: 124.3 becomes 64 in e4m3."""
    if (source, target) == (tl.float32, tl.float8e4nv):
        return torch.from_numpy(values.view(np.float32)).to(FP8).view(torch.uint8).numpy()
    return original(values, source, target, rounding_mode)


@cache
def block_type(element_type, shape):
    return core.block_type(element_type, list(shape))


@cache
def shape_and_size(shape):
    return core.tuple(map(core.constexpr, shape)), core.constexpr(math.prod(shape))


def initialize_tensor(tensor, handle, type):
    """As core.tensor does, but with one object per shape."""
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = shape_and_size(tuple(type.shape.values) if type.is_block() else ())


def broadcast(semantic, left, right, original=TritonSemantic.broadcast_impl_value):
    """As Triton does, without a new shape if the shapes are equal."""
    have_equal_shapes = left.shape is right.shape and left.type.is_block()
    return (left, right) if have_equal_shapes else original(semantic, left, right)


def avoid_repeated_work(monkeypatch):
    """One object per type and shape; one patch of Triton's language, which the caller undoes.

    By default the interpreter builds types in each operation and patches the language in each call: 40% of its time.
    """
    monkeypatch.setattr(core.pointer_type, "__hash__", core.dtype.__hash__)
    monkeypatch.setattr(interpreter, "_get_np_dtype", lambda type: numpy_dtype(type.scalar))
    monkeypatch.setattr(
        core.block_type, "with_element_ty", lambda self, element: block_type(element, tuple(self.shape.values))
    )
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "get_block_ty", lambda self, element, shape: block_type(element, tuple(shape))
    )
    monkeypatch.setattr(core.tensor, "__init__", initialize_tensor)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast)
    patched = interpreter._patch_lang(initialize_tensor)
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    return patched


@pytest.fixture
def cpu_kernels(monkeypatch):
    """No GPU, PyTorch's attention on the CPU. Few programs, because the interpreter runs them one after the other, and
    small tiles of tokens, because it also computes empty ones.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lora, "TOKENS_OF_A_SPLIT", 64)
    monkeypatch.setattr(fp8_lora, "BLOCK_COLUMNS", 64)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    # By default it looks for overflows in all integer sums and products, and reports none: `debug` is off.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(attention, "forward", attention_forward)
    monkeypatch.setattr(attention, "backward", attention_backward)
    patched = avoid_repeated_work(monkeypatch)
    yield
    patched.restore()


def attention_forward(parts, heads):
    """PyTorch's attention. The context is its autograd graph."""
    with torch.enable_grad():
        query, key, value = (part.detach().requires_grad_() for part in parts)
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    logsumexp = torch.empty(0)  # only PyTorch's GPU kernels need it
    return attention.Attended(output.detach(), logsumexp, attention.Call(False, (output, (query, key, value))))


def attention_backward(grad, parts, attended, heads):
    output, leaves = attended.call.arguments
    by_head = grad.view(-1, heads.seq_length, heads.num_queries, heads.head_dim).transpose(1, 2)
    return torch.autograd.grad(output, leaves, by_head)


def present(value: T | None) -> T:
    assert value is not None
    return value


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def scaled_product(left, right, out):
    """_scaled_mm without the rounding to bfloat16. The CPU's kernel does not support rowwise scales."""
    return torch.mm(left.fp8.float() * left.scale, (right.fp8.float() * right.scale).t(), out=out)


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


def dequantized(linear):
    """By plain arithmetic, because bitsandbytes 0.50.2 has a fault on some CPUs (pdf2lora/model/quantization.py)."""
    packed, state = linear.weight.data.flatten(), linear.weight.quant_state
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    return (state.code[codes] * scales.repeat_interleave(state.blocksize)[: codes.numel()]).view(state.shape)
