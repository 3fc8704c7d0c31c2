"""JSON files of a source model, read with checks."""

import codecs
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError

MAX_DIMENSION = 2**20  # eight times the largest number in any Llama's params.json


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if the file is missing or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows programs write a byte order mark
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing. Download it again with the source model.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: this is not valid JSON ({error}). Download the file again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: the file must be a JSON object. Download the file again.")
    return value


def copy_json(file: Path, target: Path) -> None:
    """Copies a JSON file without its byte order mark, which transformers cannot read."""
    target.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))


def whole_number(values: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """values[key], a whole number from 1 to MAX_DIMENSION, or the default if the file does not have the key.

    Raises InputError for any other value.
    """
    value = values.get(key)
    if value is None and default is not None:
        return default
    if type(value) is int and 1 <= value <= MAX_DIMENSION:
        return value
    raise InputError(
        f"{path}: {key} is {json.dumps(value)}; it must be a whole number from 1 to {MAX_DIMENSION}. "
        "Download the file again."
    )


def positive_number(values: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """values[key], a finite number above 0, or the default. Raises InputError for any other value."""
    value = values.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, (int, float)) and 0 < value < math.inf:
        return float(value)
    raise InputError(f"{path}: {key} is {json.dumps(value)}; it must be a number above 0. Download the file again.")
