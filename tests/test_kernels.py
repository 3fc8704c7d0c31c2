"""The GPU's kernels in Triton's interpreter, in float32, against plain PyTorch; whole layers against PEFT's.

And compiled, for GPUs that are not here (compile_kernels.py).

conftest.py turns the interpreter on where there is no CUDA driver; with one, `TRITON_INTERPRET=1 python -m pytest
tests/test_kernels.py` does. Attention is PyTorch's own in the kernels and is taken from its CPU side here.
"""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import triton.language as tl
from conftest import REPOSITORY
from peft import LoraConfig, inject_adapter_in_model
from tiny_llama import COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, quiet, write_tiny_llama
from torch import nn
from torch.nn import functional
from triton.runtime import interpreter

from pdf2lora.model.dropout import DropoutRate, keep_mask
from pdf2lora.model.forward import build_forward
from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels import attention, frozen, lora
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.cross_entropy import cross_entropy_
from pdf2lora.model.kernels.elementwise import add_rmsnorm, rmsnorm_backward_, swiglu, swiglu_backward_
from pdf2lora.model.kernels.llama import FusedLlama
from pdf2lora.model.kernels.projections import Projections
from pdf2lora.model.kernels.rotary import Angles, Up, rotary_backward, rotate_
from pdf2lora.model.kernels.rows import FP8, Rows, block_and_warps, quantize
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.model.loss import linear_cross_entropy
from pdf2lora.tokens import IGNORED

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled: see test_gpu.py"),
    quiet,
]
NEAR = 1e-5  # relative, in float32
NO_DROPOUT = changed(LORA, lora_dropout=0.0)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
MODES = ("none", "mlp", "full")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lora, "TOKENS_OF_A_SPLIT", 64)  # the interpreter takes its time for each tile, an empty one too
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


def convert_float(values, source, target, rounding_mode, of_triton=interpreter._convert_float):
    """The interpreter of Triton 3.7.1 loses the carry of a mantissa that is rounded up: 124.3 becomes 64 in e4m3."""
    if (source, target) == (tl.float32, tl.float8e4nv):
        return torch.from_numpy(values.view(np.float32)).to(FP8).view(torch.uint8).numpy()
    return of_triton(values, source, target, rounding_mode)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# rows


@pytest.mark.parametrize(("num_features", "expected"), [(1, (1, 4)), (96, (128, 4)), (3072, (4096, 8)), (2**15, None)])
def test_a_row_is_one_block(num_features, expected):
    block, warps = block_and_warps(num_features)

    assert (block, warps) == (expected or (2**15, 32))


def test_fp8_is_the_nearest_number_of_eight_bits_at_the_scale_of_the_row():
    values = random(5, 100) * torch.tensor([1e-3, 1.0, 300.0, 1e5, 0.0])[:, None]

    rows = quantize(values)

    largest = values.abs().amax(dim=1, keepdim=True)
    assert (rows.fp8.dtype, rows.scale.dtype) == (FP8, torch.float32)
    assert rows.values is values
    torch.testing.assert_close(rows.scale, largest.clamp(min=1e-12) / 448)
    back = rows.fp8.float() * rows.scale
    error = (back - values).abs()
    assert (error <= torch.maximum(values.abs() * 2**-4, rows.scale * 2**-10) * 1.001).all()  # 3 bits; subnormal steps
    assert rows.fp8.float()[:4].abs().amax(dim=1).tolist() == [448] * 4  # all of the range
    assert 0.01 < relative_error(back, values) < 0.04


def test_rows_hold_what_is_asked_for():
    like = torch.empty(3, 8)

    both, values, fp8 = (Rows.empty(like, 20, values=v, fp8=f) for v, f in ((True, True), (True, False), (False, True)))

    assert (both.values.shape, both.fp8.shape, both.scale.shape) == ((3, 20), (3, 20), (3, 1))
    assert (values.fp8, values.scale, fp8.values) == (None, None, None)


# elementwise kernels


def rmsnorm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("features", [64, 96, 100])
@pytest.mark.parametrize("add", [True, False])
def test_rmsnorm_and_its_gradient(features, add):
    residual, update, weight = random(7, features), random(7, features, seed=1), random(features, seed=2)
    x = (residual + update if add else residual.clone()).requires_grad_()
    expected = rmsnorm(x, weight)
    grad, beside = random(7, features, seed=3), random(7, features, seed=4)
    expected.backward(grad)

    total, rows, rstd = add_rmsnorm(residual, update if add else None, weight, 1e-5)

    torch.testing.assert_close(total, x.detach())
    assert add or total is residual
    torch.testing.assert_close(rows.values, expected.detach())
    torch.testing.assert_close(rstd, torch.rsqrt(x.detach().pow(2).mean(-1) + 1e-5))
    for extra in (None, beside):
        in_place = grad.clone()
        result = rmsnorm_backward_(in_place, total, rstd, weight, extra)
        assert result.values is in_place
        torch.testing.assert_close(in_place, x.grad + (0 if extra is None else extra), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [64, 88])
def test_swiglu_and_its_gradient(width):
    gate_up = random(7, 2 * width).requires_grad_()
    grad = random(7, width, seed=1)
    gate, up = gate_up.split(width, dim=1)
    expected = functional.silu(gate) * up
    expected.backward(grad)

    torch.testing.assert_close(swiglu(gate_up.detach()).values, expected.detach())

    in_place = gate_up.detach().clone()
    assert swiglu_backward_(grad, in_place).values is in_place
    torch.testing.assert_close(in_place, gate_up.grad, rtol=1e-4, atol=1e-5)


def test_rows_of_the_kernels_are_quantized_like_finished_rows():
    features = 100
    residual, weight, grad = random(5, features), random(features, seed=1), random(5, features, seed=2)
    gate_up = random(5, 2 * features, seed=3)
    _, plain, rstd = add_rmsnorm(residual, None, weight, 1e-5)
    dx = rmsnorm_backward_(grad.clone(), residual, rstd, weight, None).values
    d_gate_up = swiglu_backward_(grad, gate_up.clone()).values
    pairs = [
        (add_rmsnorm(residual, None, weight, 1e-5, values=False, fp8=True)[1], plain.values),
        (rmsnorm_backward_(grad.clone(), residual, rstd, weight, None, fp8=True), dx),
        (swiglu(gate_up, values=False, fp8=True), swiglu(gate_up).values),
        (swiglu_backward_(grad, gate_up.clone(), values=False, fp8=True), d_gate_up),
    ]

    for rows, values in pairs:
        expected = quantize(values)
        assert torch.equal(rows.fp8.view(torch.uint8), expected.fp8.view(torch.uint8))
        assert torch.equal(rows.scale, expected.scale)
    assert pairs[0][0].values is pairs[2][0].values is pairs[3][0].values is None


def test_gate_and_up_stay_as_they_are_where_only_fp8_is_asked_for():
    gate_up = random(5, 40)
    before = gate_up.clone()

    swiglu_backward_(random(5, 20, seed=1), gate_up, values=False, fp8=True)

    assert torch.equal(gate_up, before)


HEADS = attention.Heads(num_queries=3, num_keys=1, head_dim=24, seq_length=11)


def angles(heads):
    half = heads.head_dim // 2
    turned = torch.arange(heads.seq_length)[:, None] / 100 ** (torch.arange(half) / half)
    return Angles(turned.cos(), turned.sin())


def rotated(x, cos, sin):
    """As transformers writes it; x: (batch, heads, seq_length, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


def up(first_ranks):
    """B of the projections that have LoRA, each in its own rows and ranks."""
    ranks = 16 * sum(first >= 0 for first in first_ranks)
    b, first_row = torch.zeros(HEADS.width, ranks), 0
    for first, num_heads in zip(first_ranks, (HEADS.num_queries, HEADS.num_keys, HEADS.num_keys), strict=True):
        num_rows = num_heads * HEADS.head_dim
        if first >= 0:
            b[first_row : first_row + num_rows, first : first + 16] = random(num_rows, 16, seed=first)
        first_row += num_rows
    return Up(b, first_ranks, 16)


TOKENS = 7 * HEADS.seq_length  # more than a block of them


def test_queries_and_keys_are_rotated_and_values_are_not():
    qkv = random(TOKENS, HEADS.width)
    query, key, value = (part.clone() for part in HEADS.split(qkv))

    rotate_(qkv, angles(HEADS), HEADS)

    found = HEADS.split(qkv)
    torch.testing.assert_close(found[0], rotated(query, *angles(HEADS)))
    torch.testing.assert_close(found[1], rotated(key, *angles(HEADS)))
    assert torch.equal(found[2], value)


@pytest.mark.parametrize("first_ranks", [None, (0, 16, 32), (0, -1, 16), (-1, 0, -1), (-1, -1, 0)])
def test_unrotate_is_the_gradient_of_the_product_and_of_lora(first_ranks):
    rows, adapter = random(TOKENS, HEADS.width).requires_grad_(), first_ranks and up(first_ranks)
    low_rank = adapter and random(TOKENS, adapter.b.shape[1], seed=1).requires_grad_()
    query, key, value = HEADS.split(rows if adapter is None else rows + low_rank @ adapter.b.t())
    gradients = tuple(random(*part.shape, seed=seed) for seed, part in enumerate((query, key, value)))
    outputs = (rotated(query, *angles(HEADS)), rotated(key, *angles(HEADS)), value)
    torch.autograd.backward(outputs, gradients)
    strided = HEADS.split(torch.cat([part.transpose(1, 2) for part in gradients], dim=2).reshape(TOKENS, -1))

    for of_either_strides in (gradients, strided):
        grad_rows, grad_low_rank = rotary_backward(of_either_strides, angles(HEADS), HEADS, adapter)

        torch.testing.assert_close(grad_rows, rows.grad, rtol=1e-5, atol=1e-6)
        if adapter is None:
            assert grad_low_rank is None
        else:
            torch.testing.assert_close(grad_low_rank, low_rank.grad, rtol=1e-4, atol=1e-4)


def test_rows_of_heads_are_in_the_order_of_the_output_projection():
    attended = random(2, HEADS.num_queries, HEADS.seq_length, HEADS.head_dim)

    rows = HEADS.rows(attended)

    assert rows.shape == (2 * HEADS.seq_length, HEADS.num_queries * HEADS.head_dim)
    assert torch.equal(rows[HEADS.seq_length + 3, 24:48], attended[1, 1, 3])


# cross-entropy


@pytest.mark.parametrize("vocabulary", [50, 40_000])  # one block, and two
def test_cross_entropy_and_its_gradient(vocabulary):
    logits = (4 * random(6, vocabulary)).requires_grad_()
    targets = torch.tensor([3, IGNORED, vocabulary - 1, 0, 17, IGNORED])
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    expected.sum().backward()

    in_place = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(in_place, targets, gradient=False), expected.detach())
    assert torch.equal(in_place, logits)
    torch.testing.assert_close(cross_entropy_(in_place, targets, gradient=True), expected.detach())
    torch.testing.assert_close(in_place, logits.grad, rtol=1e-4, atol=1e-7)


def test_cross_entropy_of_large_logits_is_finite():
    logits = 1e4 * random(4, 100)
    targets = torch.tensor([0, 1, 2, 3])

    torch.testing.assert_close(
        cross_entropy_(logits.clone(), targets, gradient=False),
        functional.cross_entropy(logits, targets, reduction="none"),
    )


# frozen weights


def linear4bit(out_features, in_features, *, quant_type="nf4", double=True, seed=0):
    linear = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, quant_type=quant_type, compress_statistics=double,
        compute_dtype=torch.float32,
    )  # fmt: skip
    linear.weight = bnb.nn.Params4bit(
        random(out_features, in_features, seed=seed), quant_type=quant_type, compress_statistics=double,
        requires_grad=False, module=linear,
    )  # fmt: skip
    return linear.to("cpu")


def dequantized(linear):
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(320, 128), (50, 200), (1, 64)])  # 640 blocks of 64, 156.25 and one
def test_dequantized_weights_are_those_of_bitsandbytes(quant_type, double, shape):
    linear = linear4bit(*shape, quant_type=quant_type, double=double)
    assert linear.weight.quant_state.nested == double
    out = torch.full(shape, float("nan"))

    frozen.dequantize(linear.weight, out)

    assert torch.equal(out, dequantized(linear))


def test_frozen_products_are_those_of_the_stacked_weights():
    linears = [linear4bit(40, 128), linear4bit(24, 128, seed=1)]
    stacked = torch.cat([dequantized(linear) for linear in linears])
    weights = frozen.Frozen(linears, torch.float32)
    x, grad = random(9, 128, seed=2), random(9, 64, seed=3)

    assert weights.shape == (64, 128)
    assert torch.equal(weights.weight(), stacked)
    torch.testing.assert_close(weights.forward(Rows(x)), x @ stacked.t())
    torch.testing.assert_close(weights.backward(Rows(grad)), grad @ stacked)


def scaled_product(left, right):
    """What _scaled_mm computes, without the rounding to bfloat16: rowwise scales are no matter of the CPU's kernel."""
    return (left.fp8.float() * left.scale) @ (right.fp8.float() * right.scale).t()


def test_fp8_products_go_either_way(monkeypatch):
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    linears = [linear4bit(40, 128), linear4bit(24, 128, seed=1)]
    weights = frozen.Frozen(linears, torch.float32)
    exact = weights.weight()
    x, grad = random(200, 128, seed=2), random(200, 64, seed=3)

    weights.to_fp8()

    forward, backward = weights.fp8
    assert (forward.fp8.shape, forward.scale.shape) == ((64, 128), (64, 1))
    assert (backward.fp8.shape, backward.scale.shape) == ((128, 64), (128, 1))
    assert forward.values is backward.values is None
    assert 0.01 < relative_error(weights.forward(quantize(x)), x @ exact.t()) < 0.06
    assert 0.01 < relative_error(weights.backward(quantize(grad)), grad @ exact) < 0.06


# dropout and the LoRA kernels


STATE = torch.tensor([7, 0])


def mask_of(p, layer_index, shape, *, state=STATE, seq_length=1):
    return keep_mask(state, layer_index, shape[0], seq_length, shape[1], DropoutRate(p))


def counter(p, layer_index):
    return lora.DropoutCounter(STATE, layer_index, 1, DropoutRate(p))


SHAPES = pytest.mark.parametrize(("tokens", "features"), [(150, 100), (5, 48)])  # three splits of 64 tokens, and one


@SHAPES
@pytest.mark.parametrize(("projections", "rank"), [(1, 16), (2, 16), (3, 16), (1, 32), (3, 64), (2, 256)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_down_and_its_gradients_are_those_of_the_explicit_mask(tokens, features, projections, rank, p):
    layer_index, rate = 11, DropoutRate(p)
    x, a = random(tokens, features), random(projections * rank, features, seed=1)
    grad_low_rank, grad_x = random(tokens, projections * rank, seed=2), random(tokens, features, seed=3)
    expected_low_rank, expected_a, expected_x = [], [], grad_x.clone()
    for number, (matrix, grad) in enumerate(zip(a.split(rank), grad_low_rank.split(rank, dim=1), strict=True)):
        mask = mask_of(p, layer_index + number, (tokens, features)) * rate.scale
        expected_low_rank.append((x * mask) @ matrix.t())
        expected_a.append(grad.t() @ (x * mask))
        expected_x += (grad @ matrix) * mask

    low_rank, mask = lora.down(x, a, rank, counter(p, layer_index))
    grad_a = lora.backward_(x, grad_x, a, grad_low_rank, rank, mask, rate.scale)

    assert (mask is None) == (p == 0)
    torch.testing.assert_close(low_rank, torch.cat(expected_low_rank, dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_a, torch.cat(expected_a), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-4, atol=1e-4)


def test_mask_of_a_projection_has_a_bit_for_each_feature():
    mask = lora.down(random(70, 44), random(32, 44, seed=1), 16, counter(0.3, 5)).mask

    assert (mask.shape, mask.dtype) == ((2, 70, 6), torch.uint8)
    bits = (mask[..., None] >> torch.arange(8)) & 1
    for number in (0, 1):
        assert torch.equal(bits[number].flatten(1)[:, :44].bool(), mask_of(0.3, 5 + number, (70, 44)))


def test_gradient_of_a_alone_is_the_same():
    x, a, grad_low_rank = random(20, 48), random(32, 48, seed=1), random(20, 32, seed=2)
    arguments = (a, grad_low_rank, 16, lora.down(x, a, 16, counter(0.3, 5)).mask, DropoutRate(0.3).scale)

    alone, with_x = lora.backward_(x, None, *arguments), lora.backward_(x, torch.zeros(20, 48), *arguments)

    assert torch.equal(alone, with_x)


EVALUATION = ForwardContext(GradientCheckpointing.NONE, HEADS, angles(HEADS), None, False, None)


def test_projections_stack_what_has_lora_and_leave_the_rest():
    """Of three projections the second has none: its rows of B stay zero, and its rank is not there."""
    model = nn.ModuleDict({"first": linear4bit(24, 64), "plain": linear4bit(16, 64), "last": linear4bit(8, 64)})
    inject_adapter_in_model(LoraConfig(r=5, lora_alpha=10, target_modules=["first", "last"]), model)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value)
    modules = list(model.values())
    projections = Projections(modules, torch.float32)
    x = random(9, 64)

    with torch.no_grad():
        projections.refresh()
        y, low_rank = projections.forward(Rows(x), EVALUATION)

    assert (projections.rank, low_rank.values.shape, low_rank.mask) == (16, (9, 32), None)
    torch.testing.assert_close(y, torch.cat([module(x) for module in modules], dim=1).detach(), rtol=1e-4, atol=1e-4)
    assert not projections.b[24:40].any()
    assert not projections.a[5:16].any()
    assert [tuple(parameter.shape) for parameter in projections.parameters] == [(5, 64), (24, 5), (5, 64), (8, 5)]


# whole layers


def cpu_attention(qkv, heads):
    """PyTorch's attention with its autograd graph as the context, in place of the GPU's."""
    with torch.enable_grad():
        parts = tuple(part.detach().requires_grad_() for part in heads.split(qkv))
        output = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return attention.Attended(output.detach(), False, (output, parts))


def cpu_attention_backward(grad, qkv, attended, heads):
    output, parts = attended.context
    by_head = grad.view(-1, heads.seq_length, heads.num_queries, heads.head_dim).transpose(1, 2)
    return torch.autograd.grad(output, parts, by_head)


@pytest.fixture(autouse=True)
def attention_of_the_cpu(monkeypatch):
    monkeypatch.setattr(attention, "forward", cpu_attention)
    monkeypatch.setattr(attention, "backward", cpu_attention_backward)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Hidden size and head dimension are no powers of two; three query heads to a key head."""
    return write_tiny_llama(
        tmp_path_factory.mktemp("base"),
        hidden_size=72,
        head_dim=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=88,
        num_hidden_layers=2,
    )


def adapted(base, **changes):
    """With an adapter as after a training: B is not zero."""
    torch.manual_seed(0)
    model = add_lora(load_base(base, QUANTIZATION, COMPUTE), changed(NO_DROPOUT, **changes))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.05)
    return model


def some_ids(batch, seq_length, *, seed=0):
    return torch.randint(VOCABULARY_SIZE, (batch, seq_length), generator=torch.Generator().manual_seed(seed))


def backward(forward, ids, *, scale=1.0, seed=0, first_row=0):
    """Hidden states; gradients of the summed next-token loss are added to those that are there."""
    forward.model.train()
    forward.set_dropout(seed, first_row)
    hidden = forward(ids)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    (linear_cross_entropy(hidden.flatten(0, 1), forward.head, targets.flatten()) * scale).backward()
    return hidden.detach()


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def hidden_and_gradients(forward, ids, *, seed=0, first_row=0):
    forward.model.zero_grad()
    hidden = backward(forward, ids, seed=seed, first_row=first_row)
    return hidden, gradients(forward.model)


@pytest.mark.parametrize(
    ("targets", "r", "batch", "seq_length"),
    [
        (ATTENTION, 8, 2, 19),
        (ALL_LINEAR, 20, 1, 23),
        (["v_proj", "down_proj"], 8, 2, 7),
        (["q_proj", "v_proj", "up_proj"], 20, 1, 16),
        (["k_proj", "gate_proj"], 1, 3, 5),
        (ATTENTION, 100, 1, 5),  # more than rotary_backward multiplies by
    ],
)
def test_fused_layers_are_those_of_transformers_and_peft(base, targets, r, batch, seq_length):
    model = adapted(base, target_modules=targets, r=r)
    ids = some_ids(batch, seq_length)
    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids)

    for mode in MODES:
        hidden, found = hidden_and_gradients(build_forward(model, "fused", mode), ids)

        assert relative_error(hidden, expected_hidden) < NEAR, mode
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < NEAR, (mode, max(errors, key=errors.get))
        assert found.keys() == expected.keys()
        assert len(found) == 2 * 2 * len(targets)


def test_dropout_is_drawn_again_alike_in_every_mode(base):
    model = adapted(base, lora_dropout=0.3, target_modules=ALL_LINEAR)
    ids = some_ids(2, 9)
    hidden, expected = hidden_and_gradients(build_forward(model, "fused", "none"), ids, seed=3)

    for mode in MODES[1:]:
        same_hidden, found = hidden_and_gradients(build_forward(model, "fused", mode), ids, seed=3)
        assert torch.equal(same_hidden, hidden), mode
        assert all(torch.equal(found[name], expected[name]) for name in expected), mode

    forward = build_forward(model, "fused")
    other_hidden, _ = hidden_and_gradients(forward, ids, seed=4)
    assert relative_error(other_hidden, hidden) > 1e-3
    model.eval()
    with torch.no_grad():
        evaluated = forward(ids)
        assert relative_error(evaluated, build_forward(model, "reference")(ids)) < NEAR
        assert torch.equal(forward(ids), evaluated)


def test_dropout_of_fused_layers_is_that_of_the_reference(base):
    model = adapted(base, lora_dropout=0.3, target_modules=ALL_LINEAR)
    ids = some_ids(2, 9)
    hidden, found = hidden_and_gradients(build_forward(model, "fused"), ids, seed=3, first_row=5)

    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids, seed=3, first_row=5)

    assert relative_error(hidden, expected_hidden) < NEAR
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


def test_accumulated_batches_are_one_batch(base):
    model = adapted(base)
    forward = build_forward(model, "fused", "mlp")
    ids = some_ids(2, 8)
    _, expected = hidden_and_gradients(forward, ids)

    model.zero_grad()
    for row in ids.split(1):
        backward(forward, row)

    found = gradients(model)
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


def test_gradient_of_a_scaled_loss_is_scaled(base):
    model = adapted(base)
    forward = build_forward(model, "fused")
    _, expected = hidden_and_gradients(forward, some_ids(1, 8))

    model.zero_grad()
    backward(forward, some_ids(1, 8), scale=0.25)

    found = gradients(model)
    assert max(relative_error(4 * found[name], expected[name]) for name in expected) < NEAR


def test_changed_matrices_count_in_the_next_step(base):
    """Their copies in compute precision are made anew in every pass."""
    model = adapted(base)
    forward, ids = build_forward(model, "fused"), some_ids(1, 8)
    hidden_and_gradients(forward, ids)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.mul_(1.5)

    hidden, found = hidden_and_gradients(forward, ids)

    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids)
    assert relative_error(hidden, expected_hidden) < NEAR
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


def test_disabled_adapter_gives_the_base(base):
    model = adapted(base).eval()
    forward, ids = build_forward(model, "fused"), some_ids(2, 7)
    causal_lm = load_base(base, QUANTIZATION, COMPUTE).eval()

    with torch.no_grad():
        with_adapter = forward(ids)
        with model.disable_adapter():
            assert relative_error(forward(ids), causal_lm.model(input_ids=ids).last_hidden_state) < NEAR
        assert torch.equal(forward(ids), with_adapter)
    assert relative_error(with_adapter, causal_lm.model(input_ids=ids).last_hidden_state) > 0.01


def test_fp8_layers_are_near_and_for_training_alone(base, monkeypatch):
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    model = adapted(base, target_modules=ALL_LINEAR)
    ids = some_ids(2, 16)
    expected_hidden, expected = hidden_and_gradients(build_forward(model, "fused"), ids)
    forward = FusedLlama(model, fp8=True)

    hidden, found = hidden_and_gradients(forward, ids)

    assert 0.01 < relative_error(hidden, expected_hidden) < 0.15
    for name in expected:
        assert functional.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0) > 0.9, name
    model.eval()
    with torch.no_grad():
        assert relative_error(forward(ids), expected_hidden) < NEAR


def test_nothing_is_kept_beyond_the_backward_pass(base, monkeypatch):
    forward = build_forward(adapted(base), "fused", "full")
    made = []

    def note(qkv, heads):
        made.append(weakref.ref(qkv))
        return cpu_attention(qkv, heads)

    monkeypatch.setattr(attention, "forward", note)
    hidden_and_gradients(forward, some_ids(1, 8))

    assert len(made) == 2 * 2  # forward, and again in the backward pass
    assert not [reference for reference in made if reference() is not None]


# as compiled, without a GPU


@pytest.mark.parametrize("capability", [80, 89, 90, 120])  # A100, RTX 4090, H100, RTX 5090
def test_kernels_compile_for_gpus_and_fit_into_their_shared_memory(tmp_path, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "compile_kernels.py", str(capability)],
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert compiled.returncode == 0, compiled.stderr
    kernels = [(name, *map(int, numbers)) for name, *numbers in map(str.split, compiled.stdout.splitlines())]
    assert {name for name, *_ in kernels} - {"_quantize"} == {
        "_add_rmsnorm", "_rmsnorm_backward", "_swiglu", "_swiglu_backward", "_cross_entropy", "_dequantize",
        "_down", "_backward", "_rotate", "_rotary_backward", "_keep_mask",
    }  # fmt: skip
    assert max(shared for _, _, shared, _ in kernels) <= 99 * 1024
    assert not [kernel for kernel in kernels if kernel[1] <= 16 and kernel[3] > 0]  # the usual ranks spill nothing
