"""data/samples.json: how base and adapted model continue the opening of a test document, and the nats of its tokens.

Two runs on the same kind of machine give the same text. On another kind, one draw may differ, and then the rest of the
text does.
"""

from contextlib import nullcontext
from typing import Any

from pdf2lora.documents.records import Document
from pdf2lora.evaluation.generation import generate, nats_per_token
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder

DIGITS = 3  # of nats, after the decimal point
MAX_CHARACTERS_PER_TOKEN = 40  # the text that is encoded for a sample: longer tokens shorten the sample


def sample_document(model: Any, encoder: Encoder, document: Document, settings: Sample) -> dict[str, object]:
    """One entry of data/samples.json. `tokens` are the pieces of prompt and reference with their nats.

    model: a PeftModel.
    """
    num_tokens = settings.prompt_tokens + settings.max_new_tokens
    opening = document.text[: MAX_CHARACTERS_PER_TOKEN * num_tokens]
    encoding = encoder.tokenizer.encode(opening, add_special_tokens=False)
    ends = [end for _, end in encoding.offsets][:num_tokens]
    ids = encoder.encode([opening])[0][: len(ends)]
    prompt_end = ends[: settings.prompt_tokens][-1]
    continuations, nats = {}, {}
    for name in ("base", "adapted"):
        with model.disable_adapter() if name == "base" else nullcontext():
            continuations[name] = generate(
                model,
                ids[: settings.prompt_tokens],
                encoder,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
            )
            nats[name] = nats_per_token(model, ids, encoder).round(DIGITS).tolist()
    return {
        "document": document.id,
        "prompt": opening[:prompt_end],
        "truth": opening[prompt_end : ends[-1]],
        **continuations,
        "tokens": [
            {"text": opening[begin:end], "base_nats": base, "adapted_nats": adapted}
            for begin, end, base, adapted in zip([0, *ends], ends, nats["base"], nats["adapted"], strict=False)
        ],
    }
