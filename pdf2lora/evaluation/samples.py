"""data/samples.json: the texts with which base and adapted model continue test documents, and the nats of each token.

Two runs on the same kind of machine give the same text. On another kind of machine a token may differ, and then all
later tokens differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdf2lora.documents.records import Document
from pdf2lora.evaluation.generation import generate, token_nats
from pdf2lora.model.forward import Forward
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder, Tokens

DIGITS = 3  # of nats, after the decimal point
MAX_CHARACTERS_PER_TOKEN = 40  # limits the text that is encoded; a sample is shorter if its tokens are longer


@dataclass(frozen=True)
class Opening:
    """The beginning of a document: prompt and reference."""

    document: str
    text: str
    tokens: Tokens
    ends: list[int]  # position in the text after each token
    num_prompt_tokens: int

    @property
    def prompt(self) -> Tokens:
        return self.tokens[: self.num_prompt_tokens]


@dataclass(frozen=True)
class Continuation:
    """The text that one model generates after an opening, and its NLL of the opening."""

    text: str
    nats: list[float]  # of each token of the opening


def read_openings(documents: Sequence[Document], encoder: Encoder, settings: Sample) -> list[Opening]:
    num_tokens = settings.prompt_tokens + settings.max_new_tokens
    openings = []
    for document in documents:
        text = document.text[: MAX_CHARACTERS_PER_TOKEN * num_tokens]
        offsets = encoder.tokenizer.encode(text, add_special_tokens=False).offsets
        ends = [end for _, end in offsets][:num_tokens]
        tokens = encoder.encode([text])[0][: len(ends)]
        openings.append(Opening(document.id, text, tokens, ends, settings.prompt_tokens))
    return openings


def continue_openings(
    forward: Forward, openings: Sequence[Opening], encoder: Encoder, settings: Sample
) -> list[Continuation]:
    """Continues each opening. forward: of a PeftModel; the caller turns its adapter on or off."""
    texts = generate(forward, [opening.prompt for opening in openings], encoder, settings)
    nats = [token_nats(forward.model, opening.tokens, encoder).round(DIGITS).tolist() for opening in openings]
    return [Continuation(text, values) for text, values in zip(texts, nats, strict=True)]


def sample_entries(
    openings: Sequence[Opening], base: Sequence[Continuation], adapted: Sequence[Continuation]
) -> list[dict[str, Any]]:
    """The entries of data/samples.json. `tokens` has the text and the nats of each token of prompt and reference."""
    entries = []
    for opening, of_base, of_adapted in zip(openings, base, adapted, strict=True):
        text, ends = opening.text, opening.ends
        prompt_end = ends[: opening.num_prompt_tokens][-1]
        entries.append(
            {
                "document": opening.document,
                "prompt": text[:prompt_end],
                "truth": text[prompt_end : ends[-1]],
                "base": of_base.text,
                "adapted": of_adapted.text,
                "tokens": [
                    {"text": text[begin:end], "base_nats": base_nats, "adapted_nats": adapted_nats}
                    for begin, end, base_nats, adapted_nats in zip(
                        [0, *ends], ends, of_base.nats, of_adapted.nats, strict=False
                    )
                ],
            }
        )
    return entries
