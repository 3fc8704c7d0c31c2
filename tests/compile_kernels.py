"""Compiles the kernels for compute capabilities on any machine: python compile_kernels.py <capability> [...]

Prints one line per kernel: capability, name, LoRA rank or 0, bytes of shared memory, bytes of spilled registers. The
project's own functions call the kernels on CPU tensors; this script compiles each kernel instead of launching it. It
needs its own process, because Triton interprets kernels in pytest's process.
"""

import re
import subprocess
import sys
import tempfile
from functools import partial
from types import SimpleNamespace

import bitsandbytes as bnb
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pdf2lora.model.dropout import DropoutRate
from pdf2lora.model.kernels import dequantize, dropout, fp8_lora, lora, lora_products
from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.cross_entropy import cross_entropy_
from pdf2lora.model.kernels.lora_copies import copy_lora
from pdf2lora.model.kernels.rmsnorm import add_rmsnorm, rmsnorm_backward_
from pdf2lora.model.kernels.rotary import (
    MAX_FUSED_ROTARY_RANK,
    Angles,
    HeadNorm,
    Up,
    normalize_and_rotate,
    rotary_backward,
    rotate_,
)
from pdf2lora.model.kernels.rows import FP8, Format, quantize
from pdf2lora.model.kernels.swiglu import swiglu, swiglu_backward_

FEATURES, INTERMEDIATE, VOCABULARY = 3072, 8192, 128_256  # of Llama-3.2-3B
TOKENS = 64
# Capability -> LoRA ranks of the products with A, and of the rotation. 120 has the matrix instructions of 80.
RANKS = {80: (16, lora.MAX_LORA_RANK), 90: (16, lora.MAX_LORA_RANK), 120: (16,)}
ROTARY_RANKS = {80: (16, MAX_FUSED_ROTARY_RANK, lora.MAX_LORA_RANK), 90: (16, lora.MAX_LORA_RANK), 120: (16,)}
BINARY_OF_80 = 89  # it runs binaries for 80; only the kernels with fp8 need 89


def compile_for(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: capability,  # one kernel cache per capability
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    compiled = set()

    def compile_once(kernel, grid, *args, **options) -> None:
        """Skips a kernel that differs from a compiled one in a number of heads or ranks only."""
        counts = {"FIRST_HEAD": 0, "NUM_HEADS": 1, "FIRST_RANK": min(0, options.get("FIRST_RANK", 0))}
        dtypes = tuple(getattr(value, "dtype", type(value)) for value in args)
        variant = kernel, dtypes, frozenset((options | counts).items())
        if variant not in compiled:
            compiled.add(variant)
            report(capability, kernel.run(*args, grid=grid, warmup=True, **options), options)

    JITFunction.__getitem__ = lambda kernel, grid: partial(compile_once, kernel, grid)
    if capability in (80, 90):
        elementwise(fp8=False)
    if capability != BINARY_OF_80:
        for rank in RANKS[capability]:
            products(rank, (1, 3) if rank == 16 and capability != 120 else (3,))
        products_without_dropout(capability)
        for rank in ROTARY_RANKS[capability]:
            rotation(rank)
    if capability >= 89:
        elementwise(fp8=True)
        quantize(torch.zeros(TOKENS, FEATURES, dtype=torch.bfloat16))
        for transposed in (False, True):
            out = torch.zeros(128, 128, dtype=FP8)
            dequantize.convert_to_fp8(small_linear().weight, torch.ones(128), out, transposed=transposed)
        low_rank, norms = torch.zeros(TOKENS, 48, dtype=torch.bfloat16), torch.ones(48)
        fp8_lora.append(quantize(torch.zeros(TOKENS, FEATURES, dtype=torch.bfloat16), 256), low_rank, norms)
        columns = fp8_lora.LoraColumns(torch.zeros(128, 48, dtype=torch.bfloat16), norms)
        fp8_lora.append_to_weights(columns, torch.ones(128), torch.zeros(128, 128 + 256, dtype=FP8))


def report(capability, kernel, options) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"STACK:(\d+)", usage)[1]
    print(capability, kernel.metadata.name, options.get("R", 0), kernel.metadata.shared, spilled)


def elementwise(*, fp8: bool) -> None:
    format = Format(fp8=fp8)
    x, weight = torch.zeros(TOKENS, FEATURES, dtype=torch.bfloat16), torch.zeros(FEATURES, dtype=torch.bfloat16)
    total, _, rstd = add_rmsnorm(x, x, weight, 1e-5, format)
    rmsnorm_backward_(x, total, rstd, weight, x, format)
    gate_up = torch.zeros(TOKENS, 2 * INTERMEDIATE, dtype=torch.bfloat16)
    swiglu(gate_up, format)
    swiglu_backward_(torch.zeros(TOKENS, INTERMEDIATE, dtype=torch.bfloat16), gate_up, format, result=True)
    if not fp8:
        logits = torch.zeros(TOKENS, VOCABULARY, dtype=torch.bfloat16)
        cross_entropy_(logits, torch.zeros(TOKENS, dtype=torch.int64), gradient=True)
        dequantize.dequantize(small_linear().weight, torch.zeros(128, 128, dtype=torch.bfloat16))
        dropout.keep_mask(torch.zeros(2, dtype=torch.int64), 0, TOKENS, TOKENS, FEATURES, threshold=6554)


def small_linear() -> bnb.nn.Linear4bit:
    return bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")


def products(rank: int, numbers_of_projections: tuple[int, ...]) -> None:
    for projections in numbers_of_projections:
        x, a = (torch.zeros(rows, FEATURES, dtype=torch.bfloat16) for rows in (TOKENS, projections * rank))
        counter = lora.DropoutCounter(torch.zeros(2, dtype=torch.int64), 0, TOKENS, DropoutRate(0.1))
        low_rank, mask = lora.down(x, a, rank, counter)
        lora.gradient_of_a(x, low_rank, rank, mask, 1.1)
        b = torch.zeros(128, rank, dtype=torch.bfloat16)
        own = dequantize.Lora(torch.zeros(rank, 128, dtype=torch.bfloat16), b)
        dequantize.dequantize_and_add(small_linear().weight, own, torch.zeros(128, 128, dtype=torch.bfloat16))
        lora.add_gradient_of_x_(x, a, low_rank, rank, mask, 1.1)
    copy_lora(a.float(), b.float(), 2.0, a, b)


def products_without_dropout(capability: int) -> None:
    common = lora_products.TILE
    for rank, tile in [
        (16, lora_products.HOPPER_TILE if capability == 90 else common), (lora_products.MAX_RANK, common)
    ]:  # fmt: skip
        lora_products.TILE = tile
        rows, left = (torch.zeros(TOKENS, width, dtype=torch.bfloat16) for width in (FEATURES, rank))
        lora_products.both_products(rows, torch.zeros(rank, FEATURES, dtype=torch.bfloat16).t(), left)
    lora_products.TILE = common


def rotation(rank: int) -> None:
    heads = Heads(num_queries=24, num_keys=8, head_dim=128, seq_length=TOKENS)
    rows = torch.zeros(TOKENS, heads.width, dtype=torch.bfloat16)
    angles = Angles(torch.zeros(TOKENS, 64), torch.zeros(TOKENS, 64))
    rotate_(rows, angles, heads)
    b = torch.zeros(heads.width, 3 * rank, dtype=torch.bfloat16)
    up = Up(b, (0, rank, 2 * rank), rank) if rank <= MAX_FUSED_ROTARY_RANK else None
    rotary_backward(heads.split(rows), angles, heads, up)
    norm = HeadNorm(torch.zeros(2, heads.head_dim, dtype=torch.bfloat16), 1e-6)
    normalize_and_rotate(rows, angles, heads, norm)
    rotary_backward(heads.split(rows), angles, heads, up, rows, norm)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compile_for(int(argument))
