"""data/samples.json: how base and adapted model continue the openings of test documents, and the nats of their tokens.

Two runs on the same kind of machine give the same text. On another kind, one draw may differ, and then the rest of the
text does.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from pdf2lora.documents.records import Document
from pdf2lora.evaluation.generation import generate, token_nats
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder, Tokens

DIGITS = 3  # of nats, after the decimal point
MAX_CHARACTERS_PER_TOKEN = 40  # the text that is encoded for a sample: longer tokens shorten the sample


def sample_documents(
    model: Any, encoder: Encoder, documents: Sequence[Document], settings: Sample
) -> list[dict[str, Any]]:
    """An entry of data/samples.json for each document. `tokens` are the pieces of prompt and reference with their nats.

    model: a PeftModel.
    """
    openings = [_encode_opening(document.text, encoder, settings) for document in documents]
    prompts = [ids[: settings.prompt_tokens] for _, ids, _ in openings]
    continuations, nats = {}, {}
    for name in ("base", "adapted"):
        with model.disable_adapter() if name == "base" else nullcontext():
            continuations[name] = generate(model, prompts, encoder, settings)
            nats[name] = [token_nats(model, ids, encoder).round(DIGITS).tolist() for _, ids, _ in openings]
    samples = []
    for number, (document, (text, _, ends)) in enumerate(zip(documents, openings, strict=True)):
        prompt_end = ends[: settings.prompt_tokens][-1]
        samples.append(
            {
                "document": document.id,
                "prompt": text[:prompt_end],
                "truth": text[prompt_end : ends[-1]],
                "base": continuations["base"][number],
                "adapted": continuations["adapted"][number],
                "tokens": [
                    {"text": text[begin:end], "base_nats": base, "adapted_nats": adapted}
                    for begin, end, base, adapted in zip(
                        [0, *ends], ends, nats["base"][number], nats["adapted"][number], strict=False
                    )
                ],
            }
        )
    return samples


def _encode_opening(text: str, encoder: Encoder, settings: Sample) -> tuple[str, Tokens, list[int]]:
    """The beginning of a text, its first tokens, and the position in the text after each of them."""
    num_tokens = settings.prompt_tokens + settings.max_new_tokens
    opening = text[: MAX_CHARACTERS_PER_TOKEN * num_tokens]
    encoding = encoder.tokenizer.encode(opening, add_special_tokens=False)
    ends = [end for _, end in encoding.offsets][:num_tokens]
    return opening, encoder.encode([opening])[0][: len(ends)], ends
