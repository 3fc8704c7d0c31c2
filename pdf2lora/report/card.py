"""reports/model_card.md: the facts that a user of the adapter or of the merged model needs."""

from pdf2lora.params import Params
from pdf2lora.report.results import Results
from pdf2lora.report.templates import environment


def render_card(results: Results, params: Params, merged: dict[str, float] | None = None) -> str:
    """A model card with the front matter of the Hugging Face hub.

    merged: perplexity, low_95 and high_95 of the merged model; None writes the card of the adapter.
    """
    return environment().get_template("model_card.md.jinja").render(r=results, params=params, merged=merged)
