"""The families of base models that were compared with transformers, and what the fused kernels support.

Any other decoder-only model that transformers loads is accepted too, and runs on the reference kernels. To add a
family, add an entry here and a tiny model in tests/tiny_families.py: the tests compare each entry with transformers,
and the fused kernels with the reference.
"""

from dataclasses import dataclass


def is_target(layer: str, target: str) -> bool:
    """Whether a name in lora.target_modules (q_proj, self_attn.q_proj) selects a layer of a block, by PEFT's rule."""
    return layer == target or layer.endswith(f".{target}")


@dataclass(frozen=True)
class Family:
    """The special parts are those that the fused kernels support; model/architectures.py has their limits."""

    architecture: str
    """Class of transformers, in config.json's `architectures`."""
    model_type: str
    """In config.json."""
    is_fused: bool = False
    """The fused and fp8 kernels support it, with all its special parts."""
    qkv_bias: bool = False
    """q, k and v can have a bias."""
    mlp_bias: bool = False
    """The key mlp_bias in config.json adds biases to the MLP."""
    rope_in_some_layers: bool = False
    """no_rope_layers in config.json names the layers with a rotary embedding."""
    sliding_window: bool = False
    """Some or all layers can attend to a window of the last tokens only."""


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", is_fused=True, qkv_bias=True, mlp_bias=True),  # also SmolLM and SmolLM2
        Family(
            "SmolLM3ForCausalLM",
            "smollm3",
            is_fused=True,
            qkv_bias=True,
            mlp_bias=True,
            rope_in_some_layers=True,
            sliding_window=True,
        ),
        Family("MistralForCausalLM", "mistral", is_fused=True, sliding_window=True),
        Family("MinistralForCausalLM", "ministral", is_fused=True, sliding_window=True),
        Family("Ministral3ForCausalLM", "ministral3"),
        Family("Qwen2ForCausalLM", "qwen2", is_fused=True, qkv_bias=True, sliding_window=True),  # also Qwen2.5
        Family("Qwen3ForCausalLM", "qwen3", is_fused=True, qkv_bias=True, sliding_window=True),
        Family("GemmaForCausalLM", "gemma"),
        Family("Gemma2ForCausalLM", "gemma2"),
        Family("Gemma3ForCausalLM", "gemma3_text"),
        Family("PhiForCausalLM", "phi"),
        Family("Phi3ForCausalLM", "phi3"),
        Family("GraniteForCausalLM", "granite"),
        Family("OlmoForCausalLM", "olmo"),
        Family("Olmo2ForCausalLM", "olmo2"),
        Family("Olmo3ForCausalLM", "olmo3"),
    )
}

FUSED_MODEL_TYPES = frozenset(family.model_type for family in FAMILIES.values() if family.is_fused)
