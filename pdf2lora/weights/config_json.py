"""The sizes in Hugging Face's config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdf2lora.weights.json_files import whole_number

LinearLayers = dict[str, tuple[int, int]]
"""{path of a linear layer in a block (self_attn.q_proj): (input features, output features)}"""


def llama_layers(*, hidden: int, query: int, key: int, intermediate: int) -> LinearLayers:
    """query, key: features of all heads of the projections to queries, and to keys or values."""
    return {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }


def read_llama_layers(config: Mapping[str, Any], path: Path) -> LinearLayers:
    """The layers of a config.json, with transformers' defaults for num_key_value_heads and head_dim.

    path: of the file, for error messages.

    Raises InputError if a size is missing or absurd.
    """
    hidden = whole_number(config, "hidden_size", path)
    num_heads = whole_number(config, "num_attention_heads", path)
    num_kv_heads = whole_number(config, "num_key_value_heads", path, default=num_heads)
    head_dim = whole_number(config, "head_dim", path, default=hidden // num_heads)
    intermediate = whole_number(config, "intermediate_size", path)
    return llama_layers(
        hidden=hidden, query=num_heads * head_dim, key=num_kv_heads * head_dim, intermediate=intermediate
    )


def summarize(config: Any, dtype: str) -> dict[str, object]:
    """The model's sizes for metrics/convert.json.

    config: an object with the attributes of a transformers configuration; dtype: of the stored weights.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    num_heads = getattr(config, "num_attention_heads", None)
    return {
        "hidden_size": getattr(config, "hidden_size", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_heads": num_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "intermediate_size": getattr(config, "intermediate_size", None),
        "vocab_size": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "dtype": dtype,
        "rope_theta": rope.get("rope_theta"),
        "rope_factor": rope.get("factor"),
        "context_length": config.max_position_embeddings,
    }
