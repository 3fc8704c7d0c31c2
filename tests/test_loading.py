import json

import bitsandbytes as bnb
import pytest
import torch
from tiny_families import write_tiny_family
from tiny_llama import COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, fill_b, quiet, trainable, write_tiny_llama
from torch import Tensor, nn

from pdf2lora.errors import InputError
from pdf2lora.model.dropout import CounterDropout, dropout_state
from pdf2lora.model.loading import add_lora, load_adapter, load_base

pytestmark = quiet
LAYER_OF_BITS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: nn.Linear}
BLOCK_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NUM_LAYERS = 2
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
NO_DROPOUT = changed(LORA, lora_dropout=0.0)


def load(base, *, bits=4, compute=COMPUTE):
    return load_base(base, changed(QUANTIZATION, bits=bits), compute)


def logits(model) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits


def gradients(model) -> dict[str, Tensor]:
    """Gradients of the next-token loss by parameter name."""
    model.train().zero_grad()
    if state := dropout_state(model):
        state.set(0, 0)
    ids = IDS.to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def redraw_b(model):
    """Makes the B matrices nonzero, as after training."""
    torch.manual_seed(1)
    return fill_b(model)


# the base


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_only_the_linear_layers_of_the_blocks_are_quantized(base, bits):
    model = load(base, bits=bits)

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {name: module for name, module in linear.items() if name != "lm_head"}
    assert len(in_blocks) == NUM_LAYERS * len(BLOCK_LINEARS)
    assert {name.rpartition(".")[2] for name in in_blocks} == BLOCK_LINEARS
    assert {type(module) for module in in_blocks.values()} == {LAYER_OF_BITS[bits]}
    assert type(linear["lm_head"]) is nn.Linear
    others = [model.lm_head, model.model.embed_tokens, model.model.norm]
    others += [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    assert {module.weight.dtype for module in others} == {torch.float32}


def test_layers_have_the_4_bit_settings(base):
    def first_state(**changes):
        layer = load_base(base, changed(QUANTIZATION, **changes), COMPUTE).model.layers[0].self_attn.q_proj
        assert layer.compute_dtype == torch.float32
        return layer.weight.quant_state

    assert (first_state().quant_type, first_state().nested) == ("nf4", True)
    assert first_state(bnb_4bit_quant_type="fp4").quant_type == "fp4"
    assert not first_state(bnb_4bit_use_double_quant=False).nested


def test_base_is_frozen_and_has_no_key_value_cache(base):
    model = load(base)

    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.config.use_cache


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_quantized_base_is_close_to_the_unquantized_one(base, bits):
    unquantized = load(base, bits=16)
    quantized = load(base, bits=bits)

    distance = (logits(quantized) - logits(unquantized)).norm() / logits(unquantized).norm()

    assert distance <= {4: 0.4, 8: 0.03, 16: 0}[bits]
    assert bits == 16 or distance > 0


def test_4_bit_layers_are_never_repacked(base, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)

    layers = [module for module in load(base).modules() if isinstance(module, bnb.nn.Linear4bit)]

    assert len(layers) == NUM_LAYERS * len(BLOCK_LINEARS)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_4_bit_gradients_are_those_of_the_dequantized_weights_after_an_evaluation_too(base):
    quantized = redraw_b(add_lora(load(base), NO_DROPOUT))
    unquantized = redraw_b(add_lora(load(base, bits=16), NO_DROPOUT))
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
                unquantized.get_submodule(name).weight.copy_(weight)
        for name, value in unquantized.named_parameters():
            if value.requires_grad:
                value.copy_(quantized.get_parameter(name))

    torch.testing.assert_close(logits(quantized), logits(unquantized), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(quantized), gradients(unquantized), rtol=1e-3, atol=1e-5)


# LoRA


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_forward_and_backward_run(base, bits):
    model = add_lora(load(base, bits=bits), LORA)

    found = gradients(model)

    assert logits(model).shape == (*IDS.shape, VOCABULARY_SIZE)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(gradient.any() for name, gradient in found.items() if "lora_B" in name)  # A has none while B is zero


@pytest.mark.parametrize(
    ("r", "targets", "num_trainable"),
    [
        (8, ["q_proj", "k_proj", "v_proj", "o_proj"], 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32))),
        (4, ["q_proj"], 2 * 4 * (64 + 64)),
        (16, ["gate_proj", "down_proj"], 2 * 16 * (64 + 128) * 2),
    ],
)
def test_number_of_trainable_parameters(base, r, targets, num_trainable):
    model = add_lora(load(base), changed(LORA, r=r, target_modules=targets))

    assert model.get_nb_trainable_parameters()[0] == num_trainable


@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (16, "float32"), (4, "bfloat16"), (16, "bfloat16")])
def test_only_lora_is_trained_and_it_is_float32(base, bits, dtype):
    compute = changed(COMPUTE, compute_dtype=dtype)

    model = add_lora(load(base, bits=bits, compute=compute), LORA)

    assert model.base_model.model.lm_head.weight.dtype == getattr(torch, dtype)
    found = trainable(model)
    assert len(found) == NUM_LAYERS * len(LORA.target_modules) * 2
    assert all("lora_A" in name or "lora_B" in name for name in found)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_layers_have_the_lora_settings(base):
    layer = add_lora(load(base), LORA).base_model.model.model.layers[0].self_attn.q_proj

    assert layer.scaling["default"] == LORA.lora_alpha / LORA.r
    assert layer.lora_dropout["default"].p == LORA.lora_dropout
    assert isinstance(layer.lora_dropout["default"], CounterDropout)


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_new_adapter_does_not_change_the_logits(base, bits):
    before = logits(load(base, bits=bits))

    model = add_lora(load(base, bits=bits), LORA)

    assert not any(value.any() for name, value in trainable(model).items() if "lora_B" in name)
    assert all(value.any() for name, value in trainable(model).items() if "lora_A" in name)
    assert torch.equal(logits(model), before)


def test_saved_adapter_loads_again_and_can_be_disabled(base, tmp_path):
    before = logits(load(base))
    model = redraw_b(add_lora(load(base), LORA))
    model.save_pretrained(tmp_path)

    loaded = load_adapter(load(base), tmp_path)

    adapted = logits(loaded)
    assert torch.equal(adapted, logits(model))
    assert not torch.allclose(adapted, before, atol=0.01)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(loaded), adapted)


def test_saved_target_modules_are_sorted(base, tmp_path):
    add_lora(load(base), changed(LORA, target_modules=["v_proj", "k_proj", "q_proj"])).save_pretrained(tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_model_has_the_chosen_attention(base):
    assert load(base).config._attn_implementation == "sdpa"


def test_model_with_layers_that_dequantize_wrongly_is_refused(no_gpu, monkeypatch, tmp_path):
    base = write_tiny_llama(tmp_path, hidden_size=96, intermediate_size=96)
    zeros = lambda packed, state: torch.zeros(state.shape, dtype=state.dtype)  # noqa: E731
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", zeros)

    with pytest.raises(InputError, match="does not work here for layers with 96 input features"):
        load(base)
    for bits in (8, 16):
        load(base, bits=bits)


# other architectures


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return write_tiny_family(tmp_path_factory.mktemp("phi3") / "base", "Phi3ForCausalLM", "phi3")


def lora_names(model) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"]])
def test_target_modules_are_names_of_the_model(phi3, tmp_path, targets):
    model = add_lora(load(phi3), changed(LORA, target_modules=targets))

    expected = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"] if targets == "all-linear" else targets
    assert lora_names(model) == set(expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == expected
    redraw_b(model)
    assert all(gradient.any() for gradient in gradients(model).values())


def test_target_module_that_the_model_does_not_have_is_refused(phi3):
    with pytest.raises(InputError) as caught:
        add_lora(load(phi3), changed(LORA, target_modules=["o_proj", "q_proj"]))

    assert str(caught.value) == (
        "lora.target_modules has 'q_proj'; the model has no linear layer of that name. Use down_proj, gate_up_proj, "
        "o_proj, qkv_proj or all-linear."
    )


def test_the_head_cannot_be_a_target(base):
    """The loss computes the head's product without LoRA."""
    with pytest.raises(InputError, match="'lm_head'; the model has no linear layer of that name"):
        add_lora(load_base(base, QUANTIZATION, COMPUTE), changed(LORA, target_modules=["lm_head", "q_proj"]))


def test_dora_with_8_bits_is_refused_on_a_cpu(base, no_gpu):
    """PEFT 0.21.2 loses the scales of 8-bit weights there."""
    model = load_base(base, changed(QUANTIZATION, bits=8), COMPUTE)

    with pytest.raises(InputError, match=r"lora\.use_dora is true and quantization\.bits is 8"):
        add_lora(model, changed(LORA, use_dora=True))


def test_all_linear_excludes_the_head(base):
    assert lora_names(add_lora(load(base), changed(LORA, target_modules="all-linear"))) == BLOCK_LINEARS


def test_quantized_source_model_is_used_as_it_is(base, tmp_path):
    expected = load(base)
    expected.save_pretrained(tmp_path)

    assert torch.equal(logits(load(tmp_path)), logits(expected))
    with pytest.raises(InputError, match=r"quantization\.bits is 8; the source model is quantized to 4 bits"):
        load(tmp_path, bits=8)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("t5", "'t5', which is not a causal language model"), ("no_such_model", "transformers cannot read it")],
)
def test_other_architectures_are_refused_in_one_line(tmp_path, model_type, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    with pytest.raises(InputError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_layer_that_peft_refuses_is_named(tmp_path):
    """Falcon-H1 has Mamba layers, whose out_proj gets no LoRA."""
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    folder = write_tiny_family(tmp_path / "base", "FalconH1ForCausalLM", "falcon_h1", **sizes)
    model = load_base(folder, QUANTIZATION, COMPUTE)

    with pytest.raises(
        InputError, match=r"lora.target_modules: PEFT cannot add LoRA .* 'out_proj' .* Name other layers"
    ):
        add_lora(model, changed(LORA, target_modules="all-linear"))
