"""Selects the best attempt of several engines, or the reason why a document is left out."""

import re
import unicodedata

from pdf2lora.documents import cleaning
from pdf2lora.documents.records import COMPLETE, Attempt, Extraction, Reason

MAX_UNREADABLE_CHARACTERS = 0.03  # share of all characters
MAX_SINGLE_LETTERS = 0.15  # share of all words; capitals are not counted, because they can be initials
MAX_GLUED_LETTERS = 0.2  # share of all letters in words of 26 letters or more
MIN_VOWELS = 0.2  # share of all Latin letters; counted only in texts of more than 200 Latin letters


def select(attempts: list[Attempt], *, clean: bool, min_characters: int) -> Extraction:
    """Returns the complete readable attempt, else the longest readable one, else the reason why there is no text."""
    readable = [attempt for attempt in attempts if is_readable("\n".join(attempt.pages))]
    best = max(readable, key=lambda a: (a.outcome == COMPLETE, sum(map(len, a.pages))), default=None)
    raw = "\n".join(best.pages) if best else ""
    text = cleaning.clean(best.pages) if best and clean else raw
    is_kept = len(text) >= min_characters
    return Extraction(
        num_pages=next((a.num_pages for a in attempts if a.num_pages is not None), None),
        pages_read=len(best.pages) if best else 0,
        engine=best.engine if best else None,
        attempts={attempt.engine: attempt.outcome for attempt in attempts},
        characters_raw=len(raw),
        text=text if is_kept else "",
        reason=None if is_kept else _reason(attempts, best),
    )


def _reason(attempts: list[Attempt], best: Attempt | None) -> Reason:
    """Returns why a document is left out. A complete attempt decides, then the last engine that did not crash."""
    complete = [attempt for attempt in attempts if attempt.outcome == COMPLETE]
    if best and best.outcome == COMPLETE:
        return Reason.TOO_SHORT
    if complete:
        has_text = any(page.strip() for attempt in complete for page in attempt.pages)
        return Reason.UNREADABLE_FONT if has_text else Reason.NO_TEXT_LAYER
    reasons = [Reason(attempt.outcome) for attempt in attempts]
    return next((reason for reason in reversed(reasons) if reason != Reason.CRASHED), Reason.CRASHED)


def is_readable(text: str) -> bool:
    """Returns False for the codes of a font without a Unicode map, for spaced-out letters and for glued words."""
    words = re.findall(r"[^\W\d_]+", text)
    if not words:
        return False
    unreadable = len(re.findall("[\x00\x01\x03-\x08\x10-\x1f\ue000-\uf8ff\ufffd]+", text)) / len(text)
    single_letters = sum(len(word) == 1 and word.islower() for word in words) / len(words)
    glued = sum(len(word) for word in re.findall(r"[A-Za-zÀ-ɏͰ-ӿ]{26,}", text)) / sum(map(len, words))
    latin = re.findall("[a-z]", unicodedata.normalize("NFD", text).lower())
    has_vowels = len(latin) <= 200 or sum(letter in "aeiouy" for letter in latin) / len(latin) > MIN_VOWELS
    return (
        unreadable < MAX_UNREADABLE_CHARACTERS
        and single_letters < MAX_SINGLE_LETTERS
        and glued < MAX_GLUED_LETTERS
        and has_vowels
    )
