"""The number of training tokens, counted in data/split or estimated from the PDFs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdf2lora.documents.records import read_documents
from pdf2lora.params import Params
from pdf2lora.preflight.corpus import count_pages
from pdf2lora.preflight.previous_run import PreviousRun

CHARACTERS_PER_PAGE = 2900  # mean of the demo after cleaning
CHARACTERS_PER_TOKEN = 4.0  # English prose in Llama 3's vocabulary, rounded down
MAX_TOKENIZED_CHARACTERS = 2_000_000  # the rest is extrapolated

TRAIN_DOCUMENTS = Path("data/split/train.jsonl")
TOKENIZER = Path("models/base/tokenizer.json")


@dataclass(frozen=True)
class TokenCount:
    num_tokens: int
    source: Literal["counted", "estimated"]
    explanation: str


def count_training_tokens(params: Params, previous: PreviousRun, pdfs: Sequence[Path]) -> TokenCount:
    """Counts the tokens of data/split/train.jsonl if it is current, else estimates them from the pages of the PDFs."""
    if previous.has_current_text and TRAIN_DOCUMENTS.exists():
        texts = [document.text for document in read_documents(TRAIN_DOCUMENTS)]
        if previous.has_current_base and TOKENIZER.exists():
            num_tokens, is_complete = count_tokens(texts, TOKENIZER)
            text = f"{TRAIN_DOCUMENTS} with the tokenizer of the base model"
            if not is_complete:
                text += f"; the first {MAX_TOKENIZED_CHARACTERS:,} characters, the rest extrapolated"
            return TokenCount(num_tokens, "counted", text)
        num_characters = sum(len(text) for text in texts)
        text = f"{num_characters:,} characters in {TRAIN_DOCUMENTS}, {CHARACTERS_PER_TOKEN:g} per token"
        return TokenCount(round(num_characters / CHARACTERS_PER_TOKEN), "estimated", text)
    num_pages = count_pages(pdfs, params.extract.max_pages)
    train_fraction = 1 - params.split.test_fraction - params.split.validation_fraction
    num_characters = round(num_pages * CHARACTERS_PER_PAGE * train_fraction)
    text = (
        f"{num_pages:,} pages (pdfium), {CHARACTERS_PER_PAGE:,} characters per page, "
        f"{CHARACTERS_PER_TOKEN:g} per token, {train_fraction:.0%} for training"
    )
    return TokenCount(round(num_characters / CHARACTERS_PER_TOKEN), "estimated", text)


def count_tokens(texts: Sequence[str], tokenizer: Path) -> tuple[int, bool]:
    """Tokens of the texts, with BOS and EOS for each, and whether all of them were counted.

    Characters after MAX_TOKENIZED_CHARACTERS are extrapolated.
    """
    from tokenizers import Tokenizer

    num_tokens, num_characters = 0, 0
    encoder = Tokenizer.from_file(str(tokenizer))
    for text in texts:
        num_tokens += len(encoder.encode(text, add_special_tokens=False)) + 2
        num_characters += len(text)
        if num_characters > MAX_TOKENIZED_CHARACTERS:
            total = sum(len(text) for text in texts)
            return round(num_tokens * total / num_characters), num_characters >= total
    return num_tokens, True
