"""The number of training tokens, counted in data/tokens or estimated from the text or from the PDFs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdf2lora.documents.sources import Source
from pdf2lora.params import Params
from pdf2lora.paths import TOKENS
from pdf2lora.preflight.corpus import count_pages
from pdf2lora.preflight.previous_run import PreviousRun
from pdf2lora.token_files import TokenFile

CHARACTERS_PER_PAGE = 2900  # mean of the demo after cleaning
CHARACTERS_PER_TOKEN = 4.0  # English prose in Llama 3's vocabulary, rounded down


@dataclass(frozen=True)
class TokenCount:
    num_tokens: int
    source: Literal["counted", "estimated"]
    explanation: str

    def num_sequences(self, seq_length: int) -> int:
        return -(-self.num_tokens // seq_length)


def count_training_tokens(params: Params, previous: PreviousRun, folder: Path, sources: Sequence[Source]) -> TokenCount:
    """The tokens of data/tokens if it is current, else an estimate from the characters of data/split or from pages."""
    if previous.has_current_tokens and TOKENS.exists():
        return TokenCount(len(TokenFile.open(TOKENS, "train").stream) - 1, "counted", f"{TOKENS}/train.npy")
    if previous.has_current_text and previous.split:
        num_characters = previous.split["train"]["characters"]
        text = f"{num_characters:,} characters in data/split/train.jsonl, {CHARACTERS_PER_TOKEN:g} per token"
        return TokenCount(round(num_characters / CHARACTERS_PER_TOKEN), "estimated", text)
    num_pages = count_pages(folder, sources, params.extract.max_pages)
    train_fraction = 1 - params.split.test_fraction - params.split.validation_fraction
    num_characters = round(num_pages * CHARACTERS_PER_PAGE * train_fraction)
    text = (
        f"{num_pages:,} pages (pdfium), {CHARACTERS_PER_PAGE:,} characters per page, "
        f"{CHARACTERS_PER_TOKEN:g} per token, {train_fraction:.0%} for training"
    )
    return TokenCount(round(num_characters / CHARACTERS_PER_TOKEN), "estimated", text)
