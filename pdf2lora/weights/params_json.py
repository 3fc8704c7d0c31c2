"""Meta's params.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.json_files import integer, positive_number, read_json, version_key


@dataclass(frozen=True)
class Version:
    """What params.json leaves unsaid; context_length in tokens, rope_factor None where no wavelength is stretched."""

    context_length: int
    rope_factor: float | None
    rope_theta: float  # what Meta's code takes where params.json has none


VERSIONS = {
    "1": Version(2048, None, 10000.0),
    "2": Version(4096, None, 10000.0),
    "3": Version(8192, None, 500000.0),
    "3.1": Version(131072, 8.0, 500000.0),
    "3.2": Version(131072, 32.0, 500000.0),
}


LLAMA_VERSIONS = tuple(VERSIONS)


ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class ModelArgs:
    """params.json, under Meta's names; vocab_size is None where the file leaves it to the tokenizer (-1)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    norm_eps: float
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def read_model_args(path: Path, llama_version: str) -> ModelArgs:
    """Reads params.json; raises InputError if a number is missing, absurd or contradicts another or the version."""
    params = read_json(path)
    version, key = VERSIONS[llama_version], version_key(path.parent)
    scaled = params.get("use_scaled_rope", False)
    if scaled != (version.rope_factor is not None):
        has = "no scaled rope" if version.rope_factor is None else f"scaled rope (factor {version.rope_factor:g})"
        fitting = [name for name, other in VERSIONS.items() if (other.rope_factor is not None) == scaled]
        raise InputError(
            f'{path}: use_scaled_rope is {json.dumps(scaled)}, but {key} is "{llama_version}", which has {has}; '
            f"set {key} to the version of the checkpoint ({' or '.join(fitting)})"
        )
    dim, n_heads = integer(params, "dim", path), integer(params, "n_heads", path)
    n_kv_heads = n_heads if params.get("n_kv_heads") is None else integer(params, "n_kv_heads", path)
    if dim % (2 * n_heads):
        raise InputError(
            f"{path}: dim is {dim}, must be a multiple of 2 * n_heads ({2 * n_heads}): heads consist of pairs; "
            "fetch the file again"
        )
    if n_heads % n_kv_heads:
        raise InputError(
            f"{path}: n_heads is {n_heads}, must be a multiple of n_kv_heads ({n_kv_heads}); fetch the file again"
        )
    return ModelArgs(
        dim=dim,
        n_layers=integer(params, "n_layers", path),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=None if params.get("vocab_size", -1) == -1 else integer(params, "vocab_size", path),
        norm_eps=positive_number(params, "norm_eps", path),
        rope_theta=positive_number({"rope_theta": version.rope_theta, **params}, "rope_theta", path),
    )
