"""Hugging Face's config.json: the sizes in it, and the summary of a converted model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdf2lora.weights.json_files import whole_number


@dataclass(frozen=True)
class ConfigSizes:
    """Sizes of a decoder-only model: numbers of features, heads, layers and tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


def read_sizes(config: Mapping[str, Any], path: Path) -> ConfigSizes:
    """The sizes in a config.json, with transformers' defaults for num_key_value_heads and head_dim.

    path: of the file, for error messages.

    Raises:
        InputError: a size is missing or absurd.
    """
    hidden_size = whole_number(config, "hidden_size", path)
    num_heads = whole_number(config, "num_attention_heads", path)
    has_kv_heads, has_head_dim = (config.get(key) is not None for key in ("num_key_value_heads", "head_dim"))
    return ConfigSizes(
        hidden_size=hidden_size,
        num_layers=whole_number(config, "num_hidden_layers", path),
        num_heads=num_heads,
        num_kv_heads=whole_number(config, "num_key_value_heads", path) if has_kv_heads else num_heads,
        head_dim=whole_number(config, "head_dim", path) if has_head_dim else hidden_size // num_heads,
        intermediate_size=whole_number(config, "intermediate_size", path),
        vocab_size=whole_number(config, "vocab_size", path),
    )


def summarize(config: Mapping[str, Any]) -> dict[str, object]:
    """The model's sizes for metrics/convert.json.

    config: with the rotary embedding as transformers 5 (rope_parameters) or 4 (rope_scaling, rope_theta) writes it.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "hidden_size": config.get("hidden_size"),
        "num_layers": config["num_hidden_layers"],
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads", config.get("num_attention_heads")),
        "intermediate_size": config.get("intermediate_size"),
        "vocab_size": config["vocab_size"],
        "tied": config["tie_word_embeddings"],
        "dtype": config["dtype"],
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
        "rope_factor": rope.get("factor"),
        "context_length": config.get("max_position_embeddings"),
    }
