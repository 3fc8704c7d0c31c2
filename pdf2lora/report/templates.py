"""The templates of pages and model card, with the filters that format numbers, sizes and settings."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from pdf2lora.evaluation.changes import unsigned


@cache
def get_template(name: str) -> Template:
    """A template of this folder. HTML is escaped. An unknown variable is an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "number": number, "size": size, "setting": setting}
    templates.filters |= {"interval": interval, "signed_percent": signed_percent, "unsigned": unsigned}
    return templates.get_template(name)


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def signed_percent(share: float, digits: int = 1) -> str:
    return f"{share:+.{digits}%}"


def interval(metrics: Mapping[str, Any], as_percent: bool = False) -> str:
    """The 95% interval of an entry of metrics/eval.json."""
    low, high = metrics["low_95"], metrics["high_95"]
    if low is None:
        return "no interval"
    return f"{percent(low)} to {percent(high)}" if as_percent else f"{number(low)} to {number(high)}"


def number(value: float | int | None, digits: int = 2) -> str:
    """Formats a number with thousands separators; None and nan as a dash.

    digits: decimals of a float below 10,000. A larger one has none.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits if abs(value) < 10_000 else 0}f}"


def setting(value: Any) -> str:
    """Formats a value as in params.yaml: true for True, 30 for 30.0, a list without brackets."""
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else str(value)


def size(num_bytes: int) -> str:
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes} bytes"
