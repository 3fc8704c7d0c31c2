"""Meta's params.json, and the facts about each Llama version that it does not have.

Source: meta-llama/llama-models, models/llama3/args.py and model.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.json_files import positive_number, read_json, whole_number


@dataclass(frozen=True)
class Version:
    """Facts about one Llama version that are not in params.json."""

    context_length: int
    """In tokens."""
    rope_factor: float | None
    """Factor of the scaled rotary embedding. None: the embedding is not scaled."""
    rope_theta: float
    """The default of Meta's code, if params.json has no rope_theta."""


VERSIONS = {
    "1": Version(2048, None, 10000.0),
    "2": Version(4096, None, 10000.0),
    "3": Version(8192, None, 500000.0),
    "3.1": Version(131072, 8.0, 500000.0),
    "3.2": Version(131072, 32.0, 500000.0),
    "3.3": Version(131072, 8.0, 500000.0),
}
ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEFAULT_MULTIPLE_OF = 256


@dataclass(frozen=True)
class ModelArgs:
    """params.json, under Meta's names."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    """None if the file has -1: the tokenizer has the number."""
    norm_eps: float
    rope_theta: float
    ffn_dim_multiplier: float
    multiple_of: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Features between the two feed-forward products, by Meta's rule (FeedForward in model.py)."""
        hidden_dim = int(self.ffn_dim_multiplier * int(8 * self.dim / 3))
        return self.multiple_of * -(-hidden_dim // self.multiple_of)


def version_key(source: Path) -> str:
    """The key of the Llama version of a source model in params.yaml."""
    return f"models.{source.name}.llama_version"


def require_version(source: Path, llama_version: str | None) -> str:
    """The Llama version of a source model in Meta's layout. Raises InputError if it is missing or unknown."""
    if llama_version in VERSIONS:
        return llama_version
    key, choices = version_key(source), ", ".join(VERSIONS)
    if llama_version is None:
        raise InputError(
            f"{key} is missing; {source} is in Meta's layout, whose files do not contain the Llama version. "
            f"Add it to params.yaml ({choices}): {source.name}: {{llama_version: '3.2'}}"
        )
    raise InputError(f'{key} is "{llama_version}", which is not a Llama version. Use one of {choices}.')


def read_model_args(path: Path, llama_version: str) -> ModelArgs:
    """Reads params.json.

    Raises InputError if a number is missing or out of range, or contradicts another number or the version.
    """
    params = read_json(path)
    version, key = VERSIONS[llama_version], version_key(path.parent)
    is_scaled = params.get("use_scaled_rope", False)
    if is_scaled != (version.rope_factor is not None):
        rule = "no scaled rope" if version.rope_factor is None else f"scaled rope (factor {version.rope_factor:g})"
        fitting = [name for name, other in VERSIONS.items() if (other.rope_factor is not None) == is_scaled]
        raise InputError(
            f'{path}: use_scaled_rope is {json.dumps(is_scaled)}, but {key} is "{llama_version}", which has {rule}. '
            f"Set {key} to the version of the source model ({' or '.join(fitting)})."
        )
    dim, n_heads = whole_number(params, "dim", path), whole_number(params, "n_heads", path)
    n_kv_heads = whole_number(params, "n_kv_heads", path, default=n_heads)
    if dim % (2 * n_heads):
        raise InputError(
            f"{path}: dim is {dim}; it must be a multiple of 2 * n_heads ({2 * n_heads}), because each head consists "
            "of pairs. Download the file again."
        )
    if n_heads % n_kv_heads:
        raise InputError(
            f"{path}: n_heads is {n_heads}; it must be a multiple of n_kv_heads ({n_kv_heads}). "
            "Download the file again."
        )
    return ModelArgs(
        dim=dim,
        n_layers=whole_number(params, "n_layers", path),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=None if params.get("vocab_size", -1) == -1 else whole_number(params, "vocab_size", path),
        norm_eps=positive_number(params, "norm_eps", path),
        rope_theta=positive_number({"rope_theta": version.rope_theta, **params}, "rope_theta", path),
        ffn_dim_multiplier=positive_number(params, "ffn_dim_multiplier", path, default=1.0),
        multiple_of=whole_number(params, "multiple_of", path, default=DEFAULT_MULTIPLE_OF),
    )
