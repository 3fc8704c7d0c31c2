"""reports/model_card.md: what somebody must know who is handed the adapter or the merged model."""

from pdf2lora.params import Params
from pdf2lora.report.page import environment
from pdf2lora.report.results import Results


def render_card(results: Results, params: Params, merged: dict[str, float] | None = None) -> str:
    """A model card with the front matter that the Hugging Face hub reads.

    merged: perplexity, low_95 and high_95 of the model with the adapter merged into the unquantized base; None makes
    the adapter's card.
    """
    return environment().get_template("model_card.md.jinja").render(r=results, params=params, merged=merged)
