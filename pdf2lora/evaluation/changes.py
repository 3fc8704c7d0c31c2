"""Changes of the perplexity, as evaluate and report describe them."""

from collections.abc import Mapping
from typing import Any

COSTLY_QUANTIZATION = 0.05  # increase of the perplexity of the base, as a share; above it there is a warning


def unsigned(improvement: Mapping[str, Any]) -> Mapping[str, Any]:
    """An improvement without its sign: a negative one becomes the increase of the perplexity."""
    if improvement["share"] >= 0:
        return improvement
    low, high = improvement["low_95"], improvement["high_95"]
    bounds = (None, None) if low is None else (-high, -low)
    return {"share": -improvement["share"], "low_95": bounds[0], "high_95": bounds[1]}
