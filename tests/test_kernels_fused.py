"""Whole layers: the fused kernels against transformers and PEFT."""

import gc
import weakref
from typing import Any

import pytest
import torch
from interpreted import NEAR, attention_forward, cpu_kernels, relative_error, scaled_product  # noqa: F401
from tiny_families import CHANGES, write_tiny_family
from tiny_llama import COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, fill_b, quiet, write_tiny_llama
from torch import nn
from torch.nn import functional

from pdf2lora.errors import InputError
from pdf2lora.families import FAMILIES
from pdf2lora.model.architectures import fused_obstacle
from pdf2lora.model.forward import build_forward
from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels import attention, context, frozen, lora_products, mlp, projections
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.fused import FusedForward
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.model.loss import linear_cross_entropy
from pdf2lora.runtime.manifest import write_manifest
from pdf2lora.tokens import IGNORED

pytestmark = [pytest.mark.usefixtures("cpu_kernels"), quiet]
NO_DROPOUT = changed(LORA, lora_dropout=0.0)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
MODES = ("none", "mlp", "full")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_theta": 1e4, "original_max_position_embeddings": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Hidden size and head dimension are not powers of two. Three query heads share a key head.

    So small that one program of a kernel computes a whole weight: the interpreter's time grows with the programs.
    """
    return write_tiny_llama(
        tmp_path_factory.mktemp("base"),
        hidden_size=36,
        head_dim=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=44,
        num_hidden_layers=2,
    )


def adapted(base, **changes):
    """The base model with an adapter whose B is not zero, as after training."""
    torch.manual_seed(0)
    return fill_b(add_lora(load_base(base, QUANTIZATION, COMPUTE), changed(NO_DROPOUT, **changes)))


def some_ids(batch, seq_length, *, seed=0):
    return torch.randint(VOCABULARY_SIZE, (batch, seq_length), generator=torch.Generator().manual_seed(seed))


def backward(forward, ids, *, scale=1.0, seed=0, first_sequence=0):
    """Returns hidden states. Accumulates gradients of the summed next-token loss."""
    forward.model.train()
    forward.set_dropout(seed, first_sequence)
    hidden = forward(ids)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    (linear_cross_entropy(hidden.flatten(0, 1), forward.head, targets.flatten()) * scale).backward()
    return hidden.detach()


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def hidden_and_gradients(forward, ids, *, seed=0, first_sequence=0):
    forward.model.zero_grad()
    hidden = backward(forward, ids, seed=seed, first_sequence=first_sequence)
    return hidden, gradients(forward.model)


@pytest.mark.parametrize(
    ("targets", "r", "modes", "batch", "seq_length"),
    [
        (ATTENTION, 8, MODES, 2, 5),
        (ALL_LINEAR, 20, MODES, 1, 7),
        (["v_proj", "down_proj"], 8, ["mlp"], 2, 3),
        (["q_proj", "v_proj", "up_proj"], 20, ["full"], 1, 8),
        (["k_proj", "gate_proj"], 1, ["none", "mlp"], 3, 3),
        (ATTENTION, 100, ["none"], 1, 5),  # more than MAX_FUSED_ROTARY_RANK
    ],
)
def test_fused_layers_equal_the_reference(base, targets, r, modes, batch, seq_length):
    model = adapted(base, target_modules=targets, r=r)
    ids = some_ids(batch, seq_length)
    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids)

    for mode in modes:
        hidden, found = hidden_and_gradients(build_forward(model, "fused", mode), ids)

        assert relative_error(hidden, expected_hidden) < NEAR, mode
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < NEAR, (mode, max(errors, key=errors.__getitem__))
        assert found.keys() == expected.keys()
        assert len(found) == 2 * 2 * len(targets)


def test_a_model_without_quantization_equals_the_reference(base):
    """evaluate scores the base without quantization."""
    causal_lm = load_base(base, QUANTIZATION.model_copy(update={"bits": 16}), COMPUTE).eval()
    ids = some_ids(2, 7)

    with torch.no_grad():
        hidden, expected = (build_forward(causal_lm, kernels)(ids) for kernels in ("fused", "reference"))

    assert relative_error(hidden, expected) < NEAR


@pytest.mark.parametrize(("dropout", "fp8"), [(0.0, False), (0.0, True), (0.3, True)])
def test_rows_that_are_read_once_give_the_same_gradients(base, monkeypatch, dropout, fp8):
    """Large micro-batches compute LoRA's products of one tensor in one kernel."""
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    model = adapted(base, lora_dropout=dropout, target_modules=ALL_LINEAR)
    ids = some_ids(2, 5)
    calls = []
    both_products = projections.both_products
    monkeypatch.setattr(projections, "both_products", lambda *args: calls.append(len(args)) or both_products(*args))
    hidden, expected = hidden_and_gradients(FusedForward(model, fp8=fp8), ids, seed=3)
    assert not calls
    monkeypatch.setattr(lora_products, "MIN_ELEMENTS", 0)

    same_hidden, found = hidden_and_gradients(FusedForward(model, fp8=fp8), ids, seed=3)

    assert len(calls) == 2 * 4  # in each of two layers: gate and up, down, o
    assert relative_error(same_hidden, hidden) < NEAR
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


HEADS_OF_24 = {"head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    family.model_type: (family.architecture, family.model_type, {}) for family in FAMILIES.values() if family.is_fused
} | {
    "weights of several programs": (
        "LlamaForCausalLM", "llama", {"hidden_size": 72, "intermediate_size": 88} | HEADS_OF_24
    ),
    "attention and MLP biases": ("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True}),
    "no key heads to share": ("LlamaForCausalLM", "llama", {"num_key_value_heads": 4}),
    "heads of 24 features": ("MistralForCausalLM", "mistral", HEADS_OF_24),
    "norms over 24 features": ("Qwen3ForCausalLM", "qwen3", HEADS_OF_24),
    "llama3 angles": ("LlamaForCausalLM", "llama", {"rope_parameters": LLAMA3}),
    "yarn angles": ("LlamaForCausalLM", "llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **YARN}}),
}  # fmt: skip
# No multiples of 16, except of 64: with these, bitsandbytes has a fault on some CPUs (pdf2lora/model/quantization.py).
SMALL = {"hidden_size": 40, "head_dim": 16, "intermediate_size": 44}


@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_of_each_family_equal_the_reference(name, tmp_path):
    """Hidden states, gradients of A and B, and of the embeddings: the gradient of x of the first layer."""
    architecture, model_type, changes = MODELS[name]
    has_equal_layers = not {"layer_types", "no_rope_layers"} & CHANGES[architecture].keys()
    sizes = SMALL | {"num_hidden_layers": 1 if has_equal_layers else 2}
    folder = write_tiny_family(tmp_path / "base", architecture, model_type, **(sizes | changes))
    write_manifest(folder)
    model = adapted(folder, target_modules=ALL_LINEAR)
    assert fused_obstacle(model.config, 16) == ""
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    ids = some_ids(1, 5)
    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids)

    hidden, found = hidden_and_gradients(build_forward(model, "fused", "full"), ids)

    assert relative_error(hidden, expected_hidden) < NEAR
    errors = {parameter: relative_error(found[parameter], expected[parameter]) for parameter in expected}
    assert max(errors.values()) < 2 * NEAR, max(errors, key=errors.__getitem__)
    assert embeddings.grad is not None


def test_modules_that_the_kernels_do_not_compute_are_refused(base):
    def refusal(change):
        model = adapted(base)
        change(model.get_base_model().model.layers[1])
        with pytest.raises(InputError) as caught:
            FusedForward(model)
        return str(caught.value)

    def add_norm(layer):
        layer.post_feedforward_layernorm = nn.Identity()

    def change_scaling(layer):
        layer.self_attn.scaling = 0.1

    def replace_layer(layer):
        layer.mlp.up_proj = nn.Linear(36, 44)

    assert "the module post_feedforward_layernorm" in refusal(add_norm)
    assert "not by 0.1" in refusal(change_scaling)
    assert "the model has a Linear" in refusal(replace_layer)


def test_recomputation_draws_the_same_dropout(base):
    model = adapted(base, lora_dropout=0.3, target_modules=["v_proj", "up_proj", "down_proj"])
    ids = some_ids(1, 5)
    hidden, expected = hidden_and_gradients(build_forward(model, "fused", "none"), ids, seed=3)

    for mode in MODES[1:]:
        same_hidden, found = hidden_and_gradients(build_forward(model, "fused", mode), ids, seed=3)
        assert torch.equal(same_hidden, hidden), mode
        assert all(torch.equal(found[name], expected[name]) for name in expected), mode


@pytest.mark.parametrize(("dropout", "fp8"), [(0.0, False), (0.0, True), (0.3, True)])
def test_tiles_of_tokens_change_no_result(base, monkeypatch, dropout, fp8):
    """Ten tokens make tiles of four, four and two. The mode `none` has no tiles, and its numbers are expected."""
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    model = adapted(base, lora_dropout=dropout, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    ids = some_ids(2, 5)
    hidden, expected = hidden_and_gradients(FusedForward(model, fp8=fp8), ids, seed=3)
    monkeypatch.setattr(mlp, "MIN_TOKENS", 4)
    products = []
    swiglu = mlp.swiglu
    monkeypatch.setattr(mlp, "swiglu", lambda x, format: products.append(len(x)) or swiglu(x, format))

    for mode in (GradientCheckpointing.MLP, GradientCheckpointing.FULL):
        forward = FusedForward(model, gradient_checkpointing=mode, fp8=fp8)
        tiled_hidden, found = hidden_and_gradients(forward, ids, seed=3)

        assert products[:6] == [4, 4, 2] * 2, mode  # of two layers
        products.clear()
        assert relative_error(tiled_hidden, hidden) < NEAR, mode
        assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR, mode


@pytest.mark.parametrize(
    ("mode", "num_tokens", "sizes"),
    [
        ("none", 100_000, [100_000]),
        ("mlp", 4096, [4096]),
        ("full", 8192, [4096, 4096]),
        ("full", 32_768, [8192] * 4),
        ("offload", 66_000, [16_384] * 4 + [464]),
        ("full", 9728, [4096, 4096, 1536]),
    ],
)
def test_number_of_tokens_of_a_tile(mode, num_tokens, sizes):
    tiles = mlp._tiles(num_tokens, ForwardContext(GradientCheckpointing(mode), *[None] * 5))

    assert [tile.stop - tile.start for tile in tiles] == sizes
    assert [tile.start for tile in tiles[1:]] == [tile.stop for tile in tiles[:-1]]


def test_attention_of_long_sequences_is_computed_once(base, queries, monkeypatch):
    model, ids = adapted(base, lora_dropout=0.3), some_ids(1, 5)
    short_hidden, expected = hidden_and_gradients(build_forward(model, "fused", "full"), ids, seed=3)
    assert len(queries) == 4  # two layers, twice
    queries.clear()
    monkeypatch.setattr(context, "LONG_SEQUENCE", 5)

    hidden, found = hidden_and_gradients(build_forward(model, "fused", "full"), ids, seed=3)

    assert (len(queries), number_alive(queries)) == (2, 0)
    assert torch.equal(hidden, short_hidden)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dropout_depends_on_the_seed_and_is_off_in_evaluation(base):
    model = adapted(base, lora_dropout=0.3)
    forward, ids = build_forward(model, "fused"), some_ids(1, 5)
    with torch.no_grad():
        model.train()
        forward.set_dropout(3, 0)
        hidden = forward(ids)
        forward.set_dropout(4, 0)
        assert relative_error(forward(ids), hidden) > 1e-3
        model.eval()
        evaluated = forward(ids)
        assert relative_error(evaluated, build_forward(model, "reference")(ids)) < NEAR
        assert torch.equal(forward(ids), evaluated)


def test_fused_layers_draw_the_dropout_of_the_reference(base):
    model = adapted(base, lora_dropout=0.3, target_modules=ALL_LINEAR)
    ids = some_ids(2, 4)
    hidden, found = hidden_and_gradients(build_forward(model, "fused"), ids, seed=3, first_sequence=5)

    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids, seed=3, first_sequence=5)

    assert relative_error(hidden, expected_hidden) < NEAR
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


def test_accumulated_batches_are_one_batch(base):
    model = adapted(base)
    forward = build_forward(model, "fused", "mlp")
    ids = some_ids(2, 4)
    _, expected = hidden_and_gradients(forward, ids)

    model.zero_grad()
    for row in ids.split(1):
        backward(forward, row)

    found = gradients(model)
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


def test_gradient_of_a_scaled_loss_is_scaled(base):
    model = adapted(base)
    forward = build_forward(model, "fused")
    _, expected = hidden_and_gradients(forward, some_ids(1, 5))

    model.zero_grad()
    backward(forward, some_ids(1, 5), scale=0.25)

    found = gradients(model)
    assert max(relative_error(4 * found[name], expected[name]) for name in expected) < NEAR


def test_next_step_uses_changed_matrices(base):
    """Each forward pass copies them to compute precision."""
    model = adapted(base)
    forward, ids = build_forward(model, "fused"), some_ids(1, 5)
    hidden_and_gradients(forward, ids)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.mul_(1.5)

    hidden, found = hidden_and_gradients(forward, ids)

    expected_hidden, expected = hidden_and_gradients(build_forward(model, "reference"), ids)
    assert relative_error(hidden, expected_hidden) < NEAR
    assert max(relative_error(found[name], expected[name]) for name in expected) < NEAR


def test_disabled_adapter_gives_the_base_model(base):
    model = adapted(base).eval()
    forward, ids = build_forward(model, "fused"), some_ids(2, 7)
    causal_lm = load_base(base, QUANTIZATION, COMPUTE).eval()

    with torch.no_grad():
        with_adapter = forward(ids)
        with model.disable_adapter():
            assert relative_error(forward(ids), causal_lm.model(input_ids=ids).last_hidden_state) < NEAR
        assert torch.equal(forward(ids), with_adapter)
    assert relative_error(with_adapter, causal_lm.model(input_ids=ids).last_hidden_state) > 0.01


def test_fp8_layers_are_near_and_for_training_only(base, monkeypatch):
    monkeypatch.setattr(frozen, "_product_fp8", scaled_product)
    model = adapted(base, target_modules=ALL_LINEAR)
    ids = some_ids(1, 5)
    expected_hidden, expected = hidden_and_gradients(build_forward(model, "fused"), ids)
    forward = FusedForward(model, fp8=True)

    hidden, found = hidden_and_gradients(forward, ids)

    assert 0.01 < relative_error(hidden, expected_hidden) < 0.15
    for name in expected:
        assert functional.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0) > 0.9, name
    model.eval()
    with torch.no_grad():
        assert relative_error(forward(ids), expected_hidden) < NEAR


@pytest.fixture
def queries(monkeypatch):
    """Weak references to the rotated queries of each call of attention. Nothing frees reference cycles meanwhile."""
    references = []

    def note(parts, heads):
        attended = attention_forward(parts, heads)
        references.append(weakref.ref(attended.call.arguments[1][0]))
        return attended

    monkeypatch.setattr(attention, "forward", note)
    gc.disable()
    yield references
    gc.enable()


def number_alive(references):
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize(("mode", "kept"), [("none", 2), ("full", 0)])  # two layers
def test_activations_are_freed(base, queries, mode, kept):
    """After the backward pass, and without one when the result is gone."""
    forward = build_forward(adapted(base), "fused", mode)
    hidden = forward(some_ids(1, 5))
    assert (len(queries), number_alive(queries)) == (2, kept)

    hidden.sum().backward()
    assert number_alive(queries) == 0

    hidden = forward(some_ids(1, 5))
    del hidden
    assert number_alive(queries) == 0
