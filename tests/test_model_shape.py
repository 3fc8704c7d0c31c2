"""The shape of a source model against PEFT and against convert."""

import json

import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file
from tiny_adapter import write_tiny_adapter
from tiny_llama import LORA, QUANTIZATION, changed, quiet, write_tiny_llama

from pdf2lora.errors import InputError
from pdf2lora.preflight.model_shape import ModelShape, read_model_shape

LLAMA_3B = ModelShape(28, 3072, 3072, 1024, 8192, 128256, 3_212_749_824, 6_425_499_648)


@quiet
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_parameters_equal_those_of_peft(tmp_path, use_dora):
    base = write_tiny_llama(tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    write_tiny_adapter(tmp_path / "adapter", base, target_modules=targets, use_dora=use_dora)
    lora = changed(LORA, r=4, target_modules=targets, use_dora=use_dora)

    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")

    assert read_model_shape(base, "3.2").lora_parameters(lora) == sum(value.numel() for value in weights.values())


def test_the_demo_s_shape_equals_that_of_convert():
    shape = read_model_shape(REPOSITORY / "models/source/demo", "3.2")
    metrics = json.loads((REPOSITORY / "metrics/convert.json").read_text())

    assert shape.intermediate_size == metrics["intermediate_size"]
    assert shape.kv_size == metrics["hidden_size"] // 2
    assert shape.num_parameters == pytest.approx(metrics["num_parameters"], rel=0.01)


def test_an_explicit_head_dim_counts(tmp_path):
    base = write_tiny_llama(tmp_path / "base", head_dim=32)

    layers = read_model_shape(base, "3.2").layers

    assert layers["q_proj"] == (64, 128)
    assert layers["k_proj"] == (64, 64)
    assert layers["o_proj"] == (128, 64)


@pytest.mark.parametrize(("name", "version"), [("params.json", "3.2"), ("config.json", "1")])
def test_a_damaged_file_is_refused(tmp_path, name, version):
    (tmp_path / name).write_text("{")

    with pytest.raises(InputError, match=f"{name}: this is not valid JSON"):
        read_model_shape(tmp_path, version)


def test_a_3b_base_in_4_bits():
    assert 2.0 < LLAMA_3B.base_gib(QUANTIZATION) < 2.2
    assert LLAMA_3B.base_gib(changed(QUANTIZATION, bits=16)) == pytest.approx(2 * 3_212_749_824 / 2**30)
