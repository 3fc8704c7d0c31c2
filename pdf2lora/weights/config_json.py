"""The sizes in Hugging Face's config.json."""

from typing import Any

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
