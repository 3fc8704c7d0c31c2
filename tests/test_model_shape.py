"""The shape of a source model against PEFT and against convert."""

import json

import pytest
import torch
from helpers import REPOSITORY
from safetensors.torch import load_file, save_file
from tiny_adapter import write_tiny_adapter
from tiny_llama import LORA, QUANTIZATION, changed, quiet, write_tiny_llama
from tiny_meta import rewrite_json

from pdf2lora.preflight.model_shape import ModelShape, model_shape
from pdf2lora.preflight.source_model import inspect_source_model

LLAMA_3B = ModelShape(
    28,
    {
        "self_attn.q_proj": (3072, 3072),
        "self_attn.k_proj": (3072, 1024),
        "self_attn.v_proj": (3072, 1024),
        "self_attn.o_proj": (3072, 3072),
        "mlp.gate_proj": (3072, 8192),
        "mlp.up_proj": (3072, 8192),
        "mlp.down_proj": (8192, 3072),
    },
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

    assert shape.layers["mlp.up_proj"] == (metrics["hidden_size"], metrics["intermediate_size"])
    assert shape.layers["self_attn.k_proj"] == (metrics["hidden_size"], metrics["hidden_size"] // 2)
    assert shape.num_parameters == pytest.approx(metrics["num_parameters"], rel=0.01)


def test_an_explicit_head_dim_counts(tmp_path):
    base = write_tiny_llama(tmp_path / "base", head_dim=32)

    layers = shape_of(base).layers

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
            packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
        else:
            packed[name] = weight
    save_file(packed, base / "model.safetensors", {"format": "pt"})
    rewrite_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    shape = shape_of(base)

    assert (shape.num_layers, shape.layers) == (expected.num_layers, expected.layers)
    assert shape.num_parameters == expected.num_parameters


def test_a_3b_base_in_4_bits():
    assert 2.0 < LLAMA_3B.base_gib(QUANTIZATION) < 2.2
    assert LLAMA_3B.base_gib(changed(QUANTIZATION, bits=16)) == pytest.approx(2 * 3_212_749_824 / 2**30)
