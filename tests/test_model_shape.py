"""The shape of a source model against PEFT and against convert."""

import json

import pytest
import torch
from helpers import REPOSITORY
from safetensors.torch import load_file, save_file
from tiny_adapter import write_tiny_adapter
from tiny_families import write_tiny_family
from tiny_llama import LORA, QUANTIZATION, changed, quiet, write_tiny_llama
from tiny_meta import rewrite_json
from transformers import AutoModelForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.preflight.model_shape import ModelShape, model_shape
from pdf2lora.preflight.source_model import inspect_source_model

LLAMA_3B = ModelShape(
    28
    * [
        {
            "self_attn.q_proj": (3072, 3072),
            "self_attn.k_proj": (3072, 1024),
            "self_attn.v_proj": (3072, 1024),
            "self_attn.o_proj": (3072, 3072),
            "mlp.gate_proj": (3072, 8192),
            "mlp.up_proj": (3072, 8192),
            "mlp.down_proj": (8192, 3072),
        }
    ],
    3_212_749_824,
    6_425_499_648,
)


def shape_of(source):
    return model_shape(inspect_source_model(source, "3.2"), source)


@quiet
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "mlp.down_proj"], "all-linear"])
def test_lora_parameters_equal_those_of_peft(tmp_path, use_dora, targets):
    base = write_tiny_llama(tmp_path / "base")
    write_tiny_adapter(tmp_path / "adapter", base, target_modules=targets, use_dora=use_dora)
    lora = changed(LORA, r=4, target_modules=targets, use_dora=use_dora)

    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")

    assert shape_of(base).lora_parameters(lora) == sum(value.numel() for value in weights.values())


def test_the_demo_s_shape_equals_that_of_convert():
    shape = shape_of(REPOSITORY / "models/source/demo")
    metrics = json.loads((REPOSITORY / "metrics/convert.json").read_text())

    assert shape.blocks[0]["mlp.up_proj"] == (metrics["hidden_size"], metrics["intermediate_size"])
    assert shape.blocks[-1]["self_attn.k_proj"] == (metrics["hidden_size"], metrics["hidden_size"] // 2)
    assert shape.num_parameters == pytest.approx(metrics["num_parameters"], rel=0.01)


def test_an_explicit_head_dim_counts(tmp_path):
    base = write_tiny_llama(tmp_path / "base", head_dim=32)

    layers = shape_of(base).blocks[0]

    assert layers["self_attn.q_proj"] == (64, 128)
    assert layers["self_attn.k_proj"] == (64, 64)
    assert layers["self_attn.o_proj"] == (128, 64)


def test_a_4bit_model_has_two_parameters_in_a_byte(tmp_path):
    """bitsandbytes stores a weight as bytes of shape (n / 2, 1), and its scales as other tensors."""
    base = write_tiny_llama(tmp_path / "base")
    expected = shape_of(base)
    weights = load_file(base / "model.safetensors")
    packed = {}
    for name, weight in weights.items():
        if "_proj" in name:
            packed[name] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            packed[f"{name}.absmax"] = torch.zeros(weight.numel() // 64)
            state = json.dumps({"shape": list(weight.shape)}).encode()
            packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        else:
            packed[name] = weight
    save_file(packed, base / "model.safetensors", {"format": "pt"})
    rewrite_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    shape = shape_of(base)

    assert shape.blocks == expected.blocks
    assert shape.num_parameters == expected.num_parameters


def test_a_4bit_weight_without_its_state_is_refused(tmp_path):
    base = write_tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: torch.zeros(9, 1, dtype=torch.uint8)}, base / "model.safetensors", {"format": "pt"})
    rewrite_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    with pytest.raises(InputError, match=f"{name} has no quantization state"):
        shape_of(base)


@quiet
def test_the_blocks_of_a_hybrid_model_differ(tmp_path):
    """Its first block has no attention. check must not refuse q_proj, because train finds it in the other block."""
    layer_types = ["conv", "full_attention"]
    base = write_tiny_family(tmp_path / "base", "Lfm2ForCausalLM", "lfm2", layer_types=layer_types)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = [
        {
            name: (module.in_features, module.out_features)
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for layer in model.model.layers
    ]

    shape = shape_of(base)

    assert list(map(sorted, shape.blocks)) == list(map(sorted, expected))
    assert shape.num_linear == sum(a * b for block in expected for a, b in block.values())
    assert "self_attn.q_proj" in shape.blocks[1].keys() - shape.blocks[0].keys()


def test_a_3b_base_in_4_bits():
    assert 2.0 < LLAMA_3B.base_gib(QUANTIZATION) < 2.2
    assert LLAMA_3B.base_gib(changed(QUANTIZATION, bits=16)) == pytest.approx(2 * 3_212_749_824 / 2**30)
