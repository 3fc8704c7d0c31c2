"""The families of base models that were compared with transformers, and the special parts of each.

Any other decoder-only model that transformers loads is accepted too; it runs on the reference kernels. To add a family,
add an entry here and a tiny model in tests/tiny_families.py. The tests compare each entry with transformers.
"""

from dataclasses import dataclass
from typing import Literal

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    architecture: str
    """Class of transformers, in config.json's `architectures`."""
    model_type: str
    """In config.json."""
    kernels: Literal["fused", "reference"] = "reference"
    """The fastest kernels that compute it with common settings."""
    linear_layers: tuple[str, ...] = LLAMA_LAYERS
    """The linear layers of a block: what lora.target_modules can name."""
    qkv_bias: bool | Literal["attention_bias"] = False
    """Whether q, k and v have a bias, or the key in config.json that adds one."""
    qk_norm: Literal["head", "features"] | None = None
    """q and k are normalized: each head, or all features at once."""
    explicit_head_dim: bool = False
    """The size of a head is a setting and may differ from hidden_size / num_attention_heads."""
    sliding_window: bool = False
    """Some or all layers can attend to a window of the last tokens only."""
    tied_by_default: bool = False
    """The head is the embedding if config.json does not say otherwise."""


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", "fused", qkv_bias="attention_bias", explicit_head_dim=True),
        Family(
            "SmolLM3ForCausalLM",
            "smollm3",
            "fused",
            qkv_bias="attention_bias",
            sliding_window=True,
            tied_by_default=True,
        ),
        Family("MistralForCausalLM", "mistral", "fused", explicit_head_dim=True, sliding_window=True),
        Family("MinistralForCausalLM", "ministral", explicit_head_dim=True, sliding_window=True),
        Family("Ministral3ForCausalLM", "ministral3", explicit_head_dim=True, sliding_window=True),
        Family("Qwen2ForCausalLM", "qwen2", "fused", qkv_bias=True, sliding_window=True),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            "fused",
            qkv_bias="attention_bias",
            qk_norm="head",
            explicit_head_dim=True,
            sliding_window=True,
        ),
        Family(
            "GemmaForCausalLM",
            "gemma",
            qkv_bias="attention_bias",
            explicit_head_dim=True,
            tied_by_default=True,
        ),
        Family(
            "Gemma2ForCausalLM",
            "gemma2",
            qkv_bias="attention_bias",
            explicit_head_dim=True,
            sliding_window=True,
            tied_by_default=True,
        ),
        Family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            qkv_bias="attention_bias",
            qk_norm="head",
            explicit_head_dim=True,
            sliding_window=True,
            tied_by_default=True,
        ),
        Family(
            "PhiForCausalLM",
            "phi",
            linear_layers=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
            qkv_bias=True,
        ),
        Family(
            "Phi3ForCausalLM",
            "phi3",
            linear_layers=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            sliding_window=True,
        ),
        Family("GraniteForCausalLM", "granite", qkv_bias="attention_bias"),
        Family("OlmoForCausalLM", "olmo", qkv_bias="attention_bias"),
        Family("Olmo2ForCausalLM", "olmo2", qkv_bias="attention_bias", qk_norm="features"),
        Family(
            "Olmo3ForCausalLM",
            "olmo3",
            qkv_bias="attention_bias",
            qk_norm="features",
            sliding_window=True,
        ),
    )
}
