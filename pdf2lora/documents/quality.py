"""Which engine's text is kept, and why a document is left out."""

import re
import unicodedata

from pdf2lora.documents import cleaning
from pdf2lora.documents.records import COMPLETE, Attempt, Extraction, Reason


def judge(attempts: list[Attempt], *, clean: bool, min_characters: int) -> Extraction:
    """Takes the attempt that was complete and readable, else the readable one with most text, else says why not."""
    readable = [attempt for attempt in attempts if is_readable("\n".join(attempt.pages))]
    best = max(readable, key=lambda a: (a.outcome == COMPLETE, sum(map(len, a.pages))), default=None)
    raw = "\n".join(best.pages) if best else ""
    text = cleaning.clean(best.pages) if best and clean else raw
    kept = len(text) >= min_characters
    return Extraction(
        num_pages=next((a.num_pages for a in attempts if a.num_pages is not None), None),
        pages_read=len(best.pages) if best else 0,
        engine=best.engine if best else None,
        attempts={attempt.engine: attempt.outcome for attempt in attempts},
        characters_raw=len(raw),
        text=text if kept else "",
        reason=None if kept else _why_not(attempts, best),
    )


def _why_not(attempts: list[Attempt], best: Attempt | None) -> Reason:
    """What stopped the engines counts before what little they read; the last engine's word before a crash's silence."""
    complete = [attempt for attempt in attempts if attempt.outcome == COMPLETE]
    if best and best.outcome == COMPLETE:
        return Reason.TOO_SHORT
    if complete:
        has_text = any(page.strip() for attempt in complete for page in attempt.pages)
        return Reason.UNREADABLE_FONT if has_text else Reason.NO_TEXT_LAYER
    stopped = [Reason(attempt.outcome) for attempt in attempts]
    return next((reason for reason in reversed(stopped) if reason != Reason.CRASHED), Reason.CRASHED)


def is_readable(text: str) -> bool:
    """False for text that only looks like text: codes of an unmapped font, letters set apart, words run together."""
    words = re.findall(r"[^\W\d_]+", text)
    if not words:
        return False
    noise = len(re.findall("[\x00\x01\x03-\x08\x10-\x1f\ue000-\uf8ff\ufffd]+", text)) / len(text)
    set_apart = sum(len(word) == 1 and word.islower() for word in words) / len(words)  # capitals may be initials
    latin = re.findall("[a-z]", unicodedata.normalize("NFD", text).lower())
    vowels = sum(letter in "aeiouy" for letter in latin) / len(latin) if len(latin) > 200 else 0.4
    run_together = sum(len(word) for word in re.findall(r"[A-Za-zÀ-ɏͰ-ӿ]{26,}", text)) / sum(map(len, words))
    return noise < 0.03 and set_apart < 0.15 and run_together < 0.2 and vowels > 0.2
