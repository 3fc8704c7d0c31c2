"""reports/model_card.md: the facts that a user of the adapter or of the merged model needs."""

from typing import Any

from pdf2lora.params import Params
from pdf2lora.report.results import Results
from pdf2lora.report.templates import get_template


def render_card(
    results: Results, params: Params, *, merged: dict[str, Any] | None = None, is_merged: bool = False
) -> str:
    """A model card with the front matter of the Hugging Face hub.

    merged: the test metrics of the merged model, if it exists.
    is_merged: writes the card of the merged model, not of the adapter.
    """
    card = get_template("model_card.md.jinja")
    return card.render(r=results, params=params, merged=merged, is_merged=is_merged)
