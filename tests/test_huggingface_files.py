"""Checks of a Hugging Face folder that need neither torch nor transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import LLAMA_LAYERS, write_tiny_family
from tiny_llama import VOCABULARY_SIZE, write_tiny_llama
from tiny_meta import rewrite_json

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface_files import read_huggingface


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny")


def refusal(source: Path) -> str:
    with pytest.raises(InputError) as refused:
        read_huggingface(source)
    message = str(refused.value)
    assert message.startswith(str(source))
    assert "\n" not in message
    return message


def test_sizes_are_read_from_the_headers(source: Path) -> None:
    files = read_huggingface(source)

    assert len(files.blocks) == 2
    assert files.blocks[0]["mlp.down_proj"] == (128, 64)
    assert files.blocks[0].keys() == LLAMA_LAYERS
    assert files.num_parameters == sum(weight.numel() for weight in load_file(source / "model.safetensors").values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": None}, "architectures is null; it must name one decoder-only language model"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "Use a text-only causal language model"),
        ({"is_encoder_decoder": True}, "must name one decoder-only language model"),
        ({"model_type": None}, "model_type is missing"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the source model is quantized (GPTQ)."),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized (AWQ). Use the unquantized model"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized (FP8). Use the unquantized model"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantized (8-bit bitsandbytes). Use the unquantized model",
        ),
        ({"quantization_config": {}}, "quantized (UNKNOWN)"),
        (
            {"rope_parameters": {"rope_type": "longlora"}},
            'rope_parameters has the type "longlora"; it must be one of default, linear, dynamic, yarn, longrope, ',
        ),
        ({"rope_scaling": {"type": "su"}}, 'rope_scaling has the type "su"'),
        ({"rope_parameters": {"full_attention": {"rope_type": "nope"}}}, 'rope_parameters has the type "nope"'),
        ({"vocab_size": 600}, "vocab_size in config.json is 600, but model.embed_tokens.weight has 260 rows"),
        ({"vocab_size": None}, "vocab_size is null; it must be a whole number"),
        ({"num_hidden_layers": 10**6}, "lack the weights of layer 2, but num_hidden_layers in config.json is 1000000"),
        ({"num_hidden_layers": None}, "num_hidden_layers is null; it must be a whole number"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(source: Path, changes: dict[str, Any], words: str) -> None:
    rewrite_json(source / "config.json", **changes)

    assert words in refusal(source)


def test_quantization_config_null_is_an_unquantized_model(source: Path) -> None:
    rewrite_json(source / "config.json", quantization_config=None)

    assert json.loads((source / "config.json").read_text())["quantization_config"] is None
    assert not read_huggingface(source).is_4bit


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_byte_order_mark_is_accepted(source: Path, name: str) -> None:
    (source / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8-sig")

    assert len(read_huggingface(source).blocks) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16])
def test_stored_masks_are_no_weights(source: Path, dtype: torch.dtype) -> None:
    num_parameters = read_huggingface(source).num_parameters
    weights = load_file(source / "model.safetensors")
    masks = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=dtype)}
    masks["gpt_neox.layers.0.attention.masked_bias"] = torch.ones((), dtype=dtype)
    save_file(weights | masks, source / "model.safetensors", {"format": "pt"})

    assert read_huggingface(source).num_parameters == num_parameters


def test_missing_files_are_named(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json is missing, and so is tokenizer.model" in refusal(source)

    (source / "model.safetensors").rename(source / "other.safetensors")
    assert "model.safetensors is missing. Download all files" in refusal(source)

    (source / "other.safetensors").rename(source / "model-00001-of-00001.safetensors")
    assert "model.safetensors.index.json is missing. Download all files" in refusal(source)

    (source / "model-00001-of-00001.safetensors").unlink()
    (source / "adapter_config.json").write_text("{}")
    assert "this is an adapter, not a base model" in refusal(source)

    (source / "pytorch_model.bin").touch()
    assert "only in pickled *.bin files" in refusal(source)

    (source / "model.gguf").touch()
    assert "only in GGUF files" in refusal(source)


def test_a_weight_that_only_the_index_has_is_missing(source: Path) -> None:
    weight_map = dict.fromkeys([*load_file(source / "model.safetensors"), "lm_head.bias"], "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert "names the weight lm_head.bias, but no file has it" in refusal(source)


def test_an_unknown_dtype_is_refused(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, source / "model.safetensors")

    assert "model.norm.weight is of dtype F8_E4M3; it must be one of BF16, F16, F32" in refusal(source)


@pytest.mark.parametrize(("special", "is_refused"), [(True, False), (False, True)])
def test_tokens_without_a_row(source: Path, special: bool, is_refused: bool) -> None:
    """Only special tokens may lie beyond the embedding: no text becomes one of them."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    token = tokenizer["added_tokens"][-1] | {"id": VOCABULARY_SIZE, "content": "<image>", "special": special}
    rewrite_json(source / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], token])

    if is_refused:
        assert "has a token with the id 260, but model.embed_tokens.weight has 260 rows" in refusal(source)
    else:
        read_huggingface(source)


def test_a_padded_vocabulary_is_accepted(tmp_path: Path) -> None:
    read_huggingface(write_tiny_llama(tmp_path / "padded", vocab_size=320))


def test_a_damaged_tokenizer_is_refused(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")

    assert "tokenizer.json: this is not a tokenizer" in refusal(source)


@pytest.mark.parametrize(
    ("architecture", "model_type", "changes"),
    [
        ("MixtralForCausalLM", "mixtral", {"num_local_experts": 2}),
        ("Qwen2MoeForCausalLM", "qwen2_moe", {"num_experts": 2, "num_experts_per_tok": 1}),
        ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}),
        ("OlmoeForCausalLM", "olmoe", {"num_experts": 2, "num_experts_per_tok": 1}),
        ("GptOssForCausalLM", "gpt_oss", {"num_local_experts": 2, "head_dim": 16, "rope_scaling": None}),
        ("GraniteMoeForCausalLM", "granitemoe", {"num_local_experts": 2}),
    ],
)
def test_a_mixture_of_experts_is_refused(
    tmp_path: Path, architecture: str, model_type: str, changes: dict[str, Any]
) -> None:
    """transformers does not load the experts as linear layers: they would stay in 16 bits and without LoRA."""
    source = write_tiny_family(tmp_path / "experts", architecture, model_type, **changes)

    assert "this model is a mixture of experts (model.layers.0." in refusal(source)
