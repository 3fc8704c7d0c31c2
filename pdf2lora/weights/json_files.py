"""JSON files of a checkpoint, read with checks."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError

MAX_DIMENSION = 2**20  # eight times the largest number in any Llama's params.json


def integer(params: Mapping[str, Any], name: str, path: Path) -> int:
    value = params.get(name)
    if type(value) is int and 1 <= value <= MAX_DIMENSION:
        return value
    raise InputError(
        f"{path}: {name} is {json.dumps(value)}, must be a whole number from 1 to {MAX_DIMENSION}; fetch the file again"
    )


def positive_number(params: Mapping[str, Any], name: str, path: Path) -> float:
    value = params.get(name)
    if isinstance(value, (int, float)) and 0 < value < math.inf:
        return float(value)
    raise InputError(f"{path}: {name} is {json.dumps(value)}, must be a number above 0; fetch the file again")


def describe(config: Mapping[str, Any]) -> dict[str, object]:
    """What the summary says of a config.json, in transformers 5's spelling (rope_parameters) or 4's (rope_scaling)."""
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


def version_key(source: Path) -> str:
    """The params key that says which Llama this is; a model has the name of its folder."""
    return f"models.{source.name}.llama_version"


def require_disk_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise InputError(
            f"{target}: {num_bytes / 2**30:.1f} GiB to write, {free / 2**30:.1f} GiB free; make room on that disk"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; fetch it with the checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object; fetch the file again")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
