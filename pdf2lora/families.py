"""The families of base models that were compared with transformers, and the special parts of each family.

Any other decoder-only model that transformers loads is accepted too, and runs on the reference kernels. To add a
family, add an entry here and a tiny model in tests/tiny_families.py: the tests compare each entry with transformers,
and the fused kernels with the reference.
"""

from dataclasses import dataclass
from typing import Literal

LLAMA_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def is_target(layer: str, target: str) -> bool:
    """Whether a name in lora.target_modules (q_proj, self_attn.q_proj) selects a layer of a block, by PEFT's rule."""
    return layer == target or layer.endswith(f".{target}")


@dataclass(frozen=True)
class Family:
    architecture: str
    """Class of transformers, in config.json's `architectures`."""
    model_type: str
    """In config.json."""
    linear_layers: tuple[str, ...] = LLAMA_LAYERS
    """The linear layers of a block, by their paths in it. lora.target_modules can select them."""
    qkv_bias: bool | Literal["attention_bias"] = False
    """Whether q, k and v have a bias, or the key in config.json that adds one."""
    qk_norm: Literal["head", "features"] | None = None
    """q and k are normalized: each head, or all features at once."""
    mlp_bias: bool = False
    """The key mlp_bias in config.json adds biases to the MLP."""
    rope_in_some_layers: bool = False
    """no_rope_layers in config.json names the layers with a rotary embedding."""
    explicit_head_dim: bool = False
    """The size of a head is a setting and may differ from hidden_size / num_attention_heads."""
    sliding_window: bool = False
    """Some or all layers can attend to a window of the last tokens only."""
    tied_by_default: bool = False
    """The head and the embedding are one weight by default (tie_word_embeddings)."""
    is_fused: bool = False
    """The fused and fp8 kernels support it, with all parts above (model/architectures.py has the limits)."""


FAMILIES = {
    family.architecture: family
    for family in (
        Family(  # also SmolLM and SmolLM2
            "LlamaForCausalLM",
            "llama",
            qkv_bias="attention_bias",
            mlp_bias=True,
            explicit_head_dim=True,
            is_fused=True,
        ),
        Family(
            "SmolLM3ForCausalLM",
            "smollm3",
            qkv_bias="attention_bias",
            mlp_bias=True,
            rope_in_some_layers=True,
            sliding_window=True,
            tied_by_default=True,
            is_fused=True,
        ),
        Family("MistralForCausalLM", "mistral", explicit_head_dim=True, sliding_window=True, is_fused=True),
        Family("MinistralForCausalLM", "ministral", explicit_head_dim=True, sliding_window=True, is_fused=True),
        Family("Ministral3ForCausalLM", "ministral3", explicit_head_dim=True, sliding_window=True),
        Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, sliding_window=True, is_fused=True),  # also Qwen2.5
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            qkv_bias="attention_bias",
            qk_norm="head",
            explicit_head_dim=True,
            sliding_window=True,
            is_fused=True,
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
            linear_layers=(*LLAMA_LAYERS[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"),
            qkv_bias=True,
        ),
        Family(
            "Phi3ForCausalLM",
            "phi3",
            linear_layers=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
            sliding_window=True,
        ),
        Family("GraniteForCausalLM", "granite", qkv_bias="attention_bias", mlp_bias=True),
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

FUSED_MODEL_TYPES = frozenset(family.model_type for family in FAMILIES.values() if family.is_fused)
