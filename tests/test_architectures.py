"""The allow-list of the fused kernels: configurations of many families, and of Llama with one change."""

import pytest
from tiny_families import tiny_config
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from pdf2lora.families import FAMILIES
from pdf2lora.model.architectures import FUSED_RULES, fp8_obstacle, fused_obstacle

SEQ_LENGTH = 128
OTHER_ARCHITECTURES = [
    "arcee", "bloom", "cohere", "cohere2", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gpt2", "gpt_neox", "gptj", "granite", "granitemoe", "helium", "llama4_text", "mamba", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2_moe", "qwen3_moe", "stablelm",
    "starcoder2",
]  # fmt: skip


@pytest.mark.parametrize("model_type", OTHER_ARCHITECTURES)
def test_other_architectures_are_refused(model_type):
    obstacle = fused_obstacle(CONFIG_MAPPING[model_type](), SEQ_LENGTH)

    assert obstacle == f"they do not support the architecture {model_type!r}"


@pytest.mark.parametrize("model_type", FUSED_RULES)
def test_default_configuration_of_each_family_is_accepted(model_type):
    assert fused_obstacle(CONFIG_MAPPING[model_type](), SEQ_LENGTH) == ""


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_the_fused_families_are_those_of_the_table(family):
    obstacle = fused_obstacle(tiny_config(family.architecture, family.model_type), 16)

    assert obstacle == ("" if family.is_fused else f"they do not support the architecture {family.model_type!r}")


ACCEPTED = {
    "Llama 1": LlamaConfig(num_key_value_heads=32, pretraining_tp=1),
    "Llama 3.1": LlamaConfig(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    ),
    "bias": LlamaConfig(attention_bias=True, mlp_bias=True),
    "SmolLM2": LlamaConfig.from_dict(
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "head_dim": 64}
    ),
    "Qwen2.5": Qwen2Config.from_dict({"use_mrope": False, "use_sliding_window": False, "sliding_window": 32}),
    "Qwen3": Qwen3Config(attention_bias=False, head_dim=128),
    "keys of older files": LlamaConfig.from_dict({"rope_scaling": None, "rope_theta": 1e5, "torch_dtype": "bfloat16"}),
    "SmolLM3 of the hub": SmolLM3Config.from_dict(
        {"pretraining_tp": 2, "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
    ),
    "SmolLM3": SmolLM3Config(no_rope_layers=[1, 0] * 18),
    "linear RoPE": LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "wide window": Qwen2Config(use_sliding_window=True, sliding_window=SEQ_LENGTH, max_window_layers=0),
}


@pytest.mark.parametrize("config", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_known_values_are_accepted(config):
    assert fused_obstacle(config, SEQ_LENGTH) == ""


CHANGES = [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"is_causal": False}, "is_causal False"),
    ({"sliding_window": 4096}, "sliding_window 4096"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "another": 1}}, "rope_parameters"),
    ({"rope_interleaved": True}, "rope_interleaved True"),
    ({"head_dim": 20}, "multiple of 8, the model has 20"),
    ({"head_dim": 512}, "up to 256 that are a multiple of 8, the model has 512"),
    ({"intermediate_size": 100_000}, "the model has 100,000"),
    ({"embedding_multiplier": 12.0}, "do not know the key 'embedding_multiplier'"),
    ({"residual_multiplier": 0.2}, "do not know the key 'residual_multiplier'"),
    ({"logits_scaling": 8.0}, "do not know the key 'logits_scaling'"),
    ({"final_logit_softcapping": 30.0}, "do not know the key 'final_logit_softcapping'"),
    ({"no_rope_layers": [1, 0]}, "do not know the key 'no_rope_layers'"),
    ({"layer_types": ["full_attention"] * 32}, "do not know the key 'layer_types'"),
    ({"a_key_of_the_future": 1}, "do not know the key 'a_key_of_the_future'"),
    ({"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["q_proj"]}}, "not all layers"),
    ({"quantization_config": {"load_in_8bit": True}}, "not all layers"),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}}, "stores them as bfloat16"),
]


@pytest.mark.parametrize(("changes", "reason"), CHANGES, ids=lambda value: str(value)[:40])
def test_llama_with_an_unknown_key_or_value_is_refused(changes, reason):
    config = LlamaConfig.from_dict(LlamaConfig().to_dict() | changes)

    assert reason in fused_obstacle(config, SEQ_LENGTH)


def test_quantized_source_model_is_accepted():
    settings = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"], "bnb_4bit_quant_storage": "uint8"}

    assert fused_obstacle(LlamaConfig.from_dict({"quantization_config": settings}), SEQ_LENGTH) == ""


def test_window_shorter_than_the_sequences_is_refused():
    config = AutoConfig.for_model("mistral", sliding_window=SEQ_LENGTH - 1)

    assert fused_obstacle(config, SEQ_LENGTH) == (
        "the model's sliding window has 127 tokens, compute.seq_length is 128"
    )
    assert fused_obstacle(config, SEQ_LENGTH - 1) == ""


def test_code_of_the_repository_is_refused():
    class LlamaConfigOfAnotherAuthor(LlamaConfig):  # type: ignore[misc]
        pass

    assert "do not support the architecture" in fused_obstacle(LlamaConfigOfAnotherAuthor(), SEQ_LENGTH)


def test_fp8_needs_widths_that_are_a_multiple_of_16():
    assert fp8_obstacle(LlamaConfig()) == ""
    assert "the model has one with 40" in fp8_obstacle(LlamaConfig(hidden_size=40, num_attention_heads=4))
