import json
import logging
import re

import bitsandbytes as bnb
import pytest
import torch
from tiny_llama import COMPUTE, LORA, QUANTIZATION, VOCABULARY_SIZE, changed, quiet, trainable, write_tiny_llama
from torch import Tensor, nn

from pdf2lora.errors import InputError
from pdf2lora.model import capabilities
from pdf2lora.model.capabilities import (
    attention,
    check_4bit_round_trip,
    compute_dtype,
    limit_gpu_memory,
    require_quantization,
)
from pdf2lora.model.loading import add_lora, load_adapter, load_base

pytestmark = quiet
LAYER_OF_BITS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: nn.Linear}
BLOCK_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NUM_LAYERS = 2
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
NO_DROPOUT = changed(LORA, lora_dropout=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def load(base, *, bits=4, compute=COMPUTE):
    return load_base(base, changed(QUANTIZATION, bits=bits), compute)


def logits(model) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits


def gradients(model) -> dict[str, Tensor]:
    """Of the next-token loss, by the names of the trainable parameters."""
    model.train().zero_grad()
    ids = IDS.to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def redraw_b(model):
    """B matrices as after a training: no longer zero."""
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.05)
    return model


# the base


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_linear_layers_of_the_blocks_are_quantized_and_nothing_else(base, bits):
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


def test_settings_of_4_bit_arrive_in_the_layers(base):
    def first_state(**changes):
        layer = load_base(base, changed(QUANTIZATION, **changes), COMPUTE).model.layers[0].self_attn.q_proj
        assert layer.compute_dtype == torch.float32
        return layer.weight.quant_state

    assert (first_state().quant_type, first_state().nested) == ("nf4", True)
    assert first_state(bnb_4bit_quant_type="fp4").quant_type == "fp4"
    assert not first_state(bnb_4bit_use_double_quant=False).nested


def test_no_parameter_of_the_base_is_trained_and_no_keys_are_kept(base):
    model = load(base)

    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.config.use_cache


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_quantized_base_is_near_the_whole_one(base, bits):
    whole = load(base, bits=16)
    quantized = load(base, bits=bits)

    distance = (logits(quantized) - logits(whole)).norm() / logits(whole).norm()

    assert distance <= {4: 0.4, 8: 0.03, 16: 0}[bits]
    assert bits == 16 or distance > 0


def test_4_bit_layers_are_never_repacked(base, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)

    layers = [module for module in load(base).modules() if isinstance(module, bnb.nn.Linear4bit)]

    assert len(layers) == NUM_LAYERS * len(BLOCK_LINEARS)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_4_bit_gradients_are_those_of_the_dequantized_weights_also_after_an_evaluation(base):
    quantized = redraw_b(add_lora(load(base), NO_DROPOUT))
    whole = redraw_b(add_lora(load(base, bits=16), NO_DROPOUT))
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
                whole.get_submodule(name).weight.copy_(weight)
        for name, value in whole.named_parameters():
            if value.requires_grad:
                value.copy_(quantized.get_parameter(name))

    torch.testing.assert_close(logits(quantized), logits(whole), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(quantized), gradients(whole), rtol=1e-3, atol=1e-5)


# LoRA


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_forward_and_backward_run(base, bits):
    model = add_lora(load(base, bits=bits), LORA)

    found = gradients(model)

    assert logits(model).shape == (*IDS.shape, VOCABULARY_SIZE)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(gradient.any() for name, gradient in found.items() if "lora_B" in name)  # A's wait for B to leave zero


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


def test_settings_of_lora_arrive_in_the_layers(base):
    layer = add_lora(load(base), LORA).base_model.model.model.layers[0].self_attn.q_proj

    assert layer.scaling["default"] == LORA.lora_alpha / LORA.r
    assert layer.lora_dropout["default"].p == LORA.lora_dropout


@pytest.mark.parametrize("bits", LAYER_OF_BITS)
def test_fresh_adapter_changes_nothing(base, bits):
    before = logits(load(base, bits=bits))

    model = add_lora(load(base, bits=bits), LORA)

    assert not any(value.any() for name, value in trainable(model).items() if "lora_B" in name)
    assert all(value.any() for name, value in trainable(model).items() if "lora_A" in name)
    assert torch.equal(logits(model), before)


def test_adapter_that_is_saved_is_loaded_again_and_disabled_it_is_the_base(base, tmp_path):
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


def test_sorted_target_modules_are_written_with_the_adapter(base, tmp_path):
    add_lora(load(base), changed(LORA, target_modules=["v_proj", "k_proj", "q_proj"])).save_pretrained(tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]


# the machine


def test_limit_is_a_share_of_the_gpu_and_never_more_than_all_of_it(monkeypatch):
    shares = []
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    limit_gpu_memory(20)
    limit_gpu_memory(81)

    assert shares == [0.25, 1.0]


def test_limit_without_a_gpu_does_nothing(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: pytest.fail("no GPU to limit"))

    limit_gpu_memory(20)


@pytest.mark.parametrize(("setting", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_compute_dtype_without_a_gpu(no_gpu, setting, dtype):
    assert compute_dtype(changed(COMPUTE, compute_dtype=setting)) == dtype


def test_flash_attention_without_a_gpu_is_refused(no_gpu):
    with pytest.raises(InputError) as caught:
        attention(changed(COMPUTE, attention="flash_attention_2"))

    assert str(caught.value) == (
        "compute.attention: 'flash_attention_2' cannot run here: there is no CUDA GPU; choose 'auto' or 'sdpa' "
        "(or see requirements-gpu.txt)"
    )


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "obstacle"),
    [
        (False, (9, 0), "auto", "the package flash-attn is not installed"),
        (True, (9, 0), "float32", "it computes in half precision only"),
        (True, (7, 5), "bfloat16", "it needs a GPU of compute capability 8.0 or more"),
    ],
)
def test_other_obstacles_to_flash_attention_are_named(monkeypatch, installed, capability, dtype, obstacle):
    pretend_gpu(monkeypatch, capability)
    monkeypatch.setattr(capabilities.importlib.util, "find_spec", lambda name: object() if installed else None)
    compute = changed(COMPUTE, attention="flash_attention_2", compute_dtype=dtype)

    with pytest.raises(InputError, match=f"'flash_attention_2' cannot run here: {obstacle};"):
        attention(compute)
    assert attention(changed(train, attention="auto")) == "sdpa"


def test_flash_attention_where_nothing_is_in_its_way(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(capabilities.importlib.util, "find_spec", lambda name: object())
    compute = changed(COMPUTE, compute_dtype="bfloat16")

    assert attention(changed(train, attention="auto")) == "flash_attention_2"
    assert attention(changed(train, attention="flash_attention_2")) == "flash_attention_2"
    assert attention(changed(train, attention="sdpa")) == "sdpa"
    assert caplog.messages == [
        "attention: auto asked for, flash_attention_2 runs",
        "attention: flash_attention_2 asked for, flash_attention_2 runs",
        "attention: sdpa asked for, sdpa runs",
    ]


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_auto_says_what_runs_and_why(no_gpu, caplog):
    caplog.set_level(logging.INFO)

    assert attention(changed(COMPUTE, attention="auto")) == "sdpa"

    assert caplog.messages == ["attention: auto asked for, sdpa runs (there is no CUDA GPU)"]


def test_attention_that_is_chosen_is_the_one_of_the_model(base):
    assert load(base).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("bits", "function"), [(4, "quantize_4bit"), (8, "int8_vectorwise_quant")])
def test_quantization_that_fails_is_the_users_to_mend(base, monkeypatch, bits, function):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(bnb.functional, function, fail)

    with pytest.raises(InputError) as caught:
        load(base, bits=bits)

    device = capabilities.device().type
    assert str(caught.value) == (
        f"quantization.bits: {bits} is not possible here: bitsandbytes {bnb.__version__} on {device} says "
        "'no kernel image'; install a bitsandbytes built for this machine or choose 16"
    )
    require_quantization(16)


# what 4 bits give back

RIGHT = [64, 128, 192, 320, 2048]  # multiples of a block; so are the widths of all Llamas


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_of_whole_blocks_give_back_what_was_stored(quant_type, dtype):
    check_4bit_round_trip(set(RIGHT), quant_type, dtype)


def rows_start_at_a_block(packed, state):
    """The fault of bitsandbytes 0.50.2 on AVX512, by hand: row i gets its scales from block i * (width // 64) on."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    rows, width = state.shape
    block = torch.arange(rows)[:, None] * (width // state.blocksize) + torch.arange(width) // state.blocksize
    return (state.code[codes].view(rows, width) * state.absmax[block]).to(state.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 80, 96, 1000, 1008])
def test_weights_that_come_back_with_other_scales_are_found(no_gpu, monkeypatch, width, dtype):
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", rows_start_at_a_block)

    check_4bit_round_trip(set(RIGHT), "nf4", dtype)
    with pytest.raises(InputError, match=f"layers of {width} input features"):
        check_4bit_round_trip({*RIGHT, width}, "nf4", dtype)


def test_weights_that_are_no_numbers_are_found(no_gpu, monkeypatch):
    monkeypatch.setattr(
        bnb.functional, "dequantize_4bit", lambda packed, state: torch.full(state.shape, torch.nan, dtype=state.dtype)
    )

    with pytest.raises(InputError, match="off by nan%"):
        check_4bit_round_trip({64}, "nf4", torch.float32)


def test_a_model_whose_weights_would_come_back_wrong_is_refused(no_gpu, monkeypatch, tmp_path):
    base = write_tiny_llama(tmp_path, hidden_size=96, intermediate_size=128)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", rows_start_at_a_block)

    with pytest.raises(InputError) as caught:
        load(base)

    assert re.fullmatch(
        r"quantization\.bits: 4 is not possible here for the model's layers of 96 input features: bitsandbytes "
        rf"{re.escape(bnb.__version__)} on this CPU must give back the weights that it stored, and is off by \d\d% of "
        r"the largest; choose 8 or 16, or run on a GPU",
        str(caught.value),
    )
    for bits in (8, 16):
        load(base, bits=bits)


@pytest.mark.parametrize("width", [80, 96])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_width_that_is_not_refused_computes_rightly(no_gpu, width, quant_type):
    """The check against products: whichever this machine's bitsandbytes does, the check says so."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(width, 64, bias=False, compute_dtype=torch.float32, quant_type=quant_type).to("cpu")
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    weight = (state.code[codes].view(-1, state.blocksize) * scales[:, None]).view(64, width)
    inputs = torch.randn(8, width)
    right = torch.allclose(layer(inputs), inputs @ weight.T, atol=1e-4)

    try:
        check_4bit_round_trip({width}, quant_type, torch.float32)
        refused = False
    except InputError:
        refused = True

    assert refused != right


def test_the_check_leaves_the_random_stream_alone(no_gpu):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    check_4bit_round_trip({64}, "nf4", torch.float32)

    assert torch.equal(torch.rand(3), expected)
