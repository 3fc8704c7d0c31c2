"""A tiny random model of each family, made by transformers, in Hugging Face's layout with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_llama import SIZES, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA_LAYERS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
# Settings for the special parts of a family: an explicit head_dim, a window that is shorter than the texts.
CHANGES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "MistralForCausalLM": {"head_dim": 32, "sliding_window": 16},
    "MinistralForCausalLM": {"head_dim": 32, "sliding_window": 16, "layer_types": LAYER_TYPES},
    "Ministral3ForCausalLM": {"head_dim": 32},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "GemmaForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {"head_dim": 32, "sliding_window": 16, "layer_types": LAYER_TYPES},
    "Gemma3ForCausalLM": {"head_dim": 32, "sliding_window": 16, "layer_types": LAYER_TYPES},
    "PhiForCausalLM": {"partial_rotary_factor": 0.5},
    "Phi3ForCausalLM": {"sliding_window": 16},
    "GraniteForCausalLM": {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "OlmoForCausalLM": {"clip_qkv": 1.0},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {"sliding_window": 16, "layer_types": LAYER_TYPES},
}


def tiny_config(architecture: str, model_type: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(model_type, **(SIZES | CHANGES.get(architecture, {}) | changes))
    config.architectures = [architecture]
    return config


def write_tiny_family(
    folder: Path, architecture: str, model_type: str, *, max_shard_size: str = "1GB", **changes: Any
) -> Path:
    """A random model in a new folder; changes: of its config."""
    config = tiny_config(architecture, model_type, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that matter
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
