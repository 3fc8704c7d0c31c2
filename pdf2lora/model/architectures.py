"""The model configurations that the fused and fp8 kernels support: an allow-list of keys and values in config.json.

The kernels compute a decoder of pre-norm layers:
    x += o(attention(rotary(norm(q(n1 x))), rotary(norm(k(n1 x))), v(n1 x)))
    x += down(silu(gate(n2 x)) * up(n2 x))
n1 and n2 are RMSNorms. All projections may have a bias. Qwen3 has `norm`, an RMSNorm over each head. Some layers of
SmolLM3 have no `rotary`. Attention is causal over the whole sequence, has scale 1 / sqrt(head_dim) and no dropout.

fused_obstacle() accepts a configuration of a fused family (families.py) if it knows every key and its value. Models
with any other architecture, key or value run on the reference kernels.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from pdf2lora.families import FAMILIES, Family

Rule = Callable[[Any], bool]

MAX_HEAD_DIM = 256  # of FlashAttention-2
MAX_FEATURES = 2**16  # of a row in one program of a row-wise kernel

# Keys that do not change the function from token ids to hidden states, or that follow from the weights' shapes.
# fmt: off
NEUTRAL_KEYS = frozenset(
    {
        "_model_name_or_path", "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id",
        "hidden_size", "id2label", "initializer_range", "intermediate_size", "is_llama_config", "label2id",
        "max_position_embeddings", "max_window_layers", "model_type", "no_rope_layer_interval",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "output_attentions",
        "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "quantization_config",
        "return_dict", "rms_norm_eps", "tie_word_embeddings", "torch_dtype", "transformers.js_config",
        "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache", "use_sliding_window",
        "vocab_size",
    }
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")  # the angles depend on the sequence length alone
ROPE_KEYS = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor",
        "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
        "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate", "type",
    }
)
# fmt: on


def _is(*values: Any) -> Rule:
    return lambda value: value in values


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_known_rope(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= ROPE_KEYS
        and value.get("rope_type") in ROPE_TYPES
        and value.get("partial_rotary_factor") in (None, 1)
    )


COMMON: dict[str, Rule] = {
    "attention_bias": _is(False),
    "attention_dropout": _is(0, None),
    "chunk_size_feed_forward": _is(0),
    "head_dim": lambda value: value is None or isinstance(value, int),
    "hidden_act": _is("silu"),
    "is_causal": _is(True),
    "is_encoder_decoder": _is(False),
    "mlp_bias": _is(False),
    "rope_interleaved": _is(False),
    "rope_parameters": _is_known_rope,
    "sliding_window": lambda value: value is None,
    "use_mrope": _is(False),
}
SLIDING: dict[str, Rule] = {
    "layer_types": lambda value: value is None or set(value) <= {"full_attention", "sliding_attention"},
    "sliding_window": lambda value: value is None or isinstance(value, int),
}


def _rules(family: Family) -> dict[str, Rule]:
    rules = COMMON | (SLIDING if family.sliding_window else {})
    if family.qkv_bias:  # Qwen2 has the bias for both values of the key
        rules["attention_bias"] = _is_bool
    if family.mlp_bias:
        rules["mlp_bias"] = _is_bool
    if family.rope_in_some_layers:
        rules["no_rope_layers"] = lambda value: set(value) <= {0, 1}
    return rules


FUSED_RULES = {family.model_type: _rules(family) for family in FAMILIES.values() if family.is_fused}


def fused_obstacle(config: PreTrainedConfig, seq_length: int) -> str:
    """The reason why the fused kernels do not support this model, or an empty string."""
    rules = FUSED_RULES.get(config.model_type)
    if rules is None or not type(config).__module__.startswith("transformers.models."):
        return f"they do not support the architecture {config.model_type!r}"
    for key, value in sorted(config.to_dict().items()):
        rule = rules.get(key)
        if rule is None and key not in NEUTRAL_KEYS:
            return f"they do not know the key {key!r} in the model's config.json"
        if rule is not None and not rule(value):
            return f"they do not support a model whose config.json has {key} {value!r}"
    width = max(config.hidden_size, config.intermediate_size)
    if width > MAX_FEATURES:
        return f"they support up to {MAX_FEATURES:,} features, the model has {width:,}"
    head_dim = _head_dim(config)
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"they support head dimensions up to {MAX_HEAD_DIM} that are a multiple of 8, the model has {head_dim}"
    window = sliding_window(config)
    if window is not None and window < seq_length:
        return f"the model's sliding window has {window} tokens, compute.seq_length is {seq_length}"
    return _storage_obstacle(config)


def fp8_obstacle(config: PreTrainedConfig) -> str:
    """The reason why the fp8 kernels do not support a model that the fused kernels support, or an empty string."""
    heads = (config.num_attention_heads, config.num_key_value_heads)
    widths = [config.hidden_size, config.intermediate_size, *(number * _head_dim(config) for number in heads)]
    if odd := [width for width in widths if width % 16]:
        return f"they need layers whose features are a multiple of 16, the model has one with {odd[0]}"
    return ""


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The length of the layers' sliding window, or None. Sequences that are not longer have full causal attention."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _head_dim(config: PreTrainedConfig) -> int:
    head_dim: int | None = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def _storage_obstacle(config: PreTrainedConfig) -> str:
    """The reason why the kernels cannot read the weights of a quantized source model, or an empty string."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    skipped = set(settings.get("llm_int8_skip_modules") or ()) - {"lm_head"}
    if not settings.get("load_in_4bit") or skipped:
        return "not all layers of the quantized source model have 4 bits"
    storage = settings.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        return f"they read weights that are stored as uint8, the quantized source model stores them as {storage}"
    return ""
