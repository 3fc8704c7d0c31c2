"""Selects the best text of a document, or the reason why the document is left out."""

from collections.abc import Sequence
from dataclasses import replace

from pdf2lora.documents import cleaning
from pdf2lora.documents.language import detect_language
from pdf2lora.documents.quality import has_codes, is_readable, is_right_to_left, num_word_errors
from pdf2lora.documents.records import COMPLETE, Attempt, Extraction, Reason

RIGHT_TO_LEFT_ENGINE = "pdfium"  # only this engine puts right-to-left lines in reading order
CLEARLY_FEWER = 0.8  # a later engine is better if it has at most 80% of the word errors,
MIN_DIFFERENCE = 0.001  # and the difference is at least 0.1% of the words,
MIN_TEXT_SHARE = 0.5  # and it has at least 50% of the characters
SAMPLE_PAGES = 4  # of a document, which a later engine reads first


def pages_to_compare(first: Attempt) -> list[int] | None:
    """Returns the pages that a later engine reads first: some with text, and all that the first engine left empty.

    None: it reads all pages, because the first one did not, or its text is unreadable or runs from right to left.
    """
    pages = _without_codes(first).pages
    text = "\n".join(pages)
    if first.outcome != COMPLETE or not is_readable(text) or is_right_to_left(text):
        return None
    with_text = [number for number, page in enumerate(pages) if page.strip()]
    if len(with_text) <= SAMPLE_PAGES:
        return None
    sample = {with_text[(2 * part + 1) * len(with_text) // (2 * SAMPLE_PAGES)] for part in range(SAMPLE_PAGES)}
    return [number for number, page in enumerate(pages) if number in sample or not page.strip()]


def as_sample(attempt: Attempt, numbers: Sequence[int], num_pages: int) -> Attempt:
    """Returns the attempt with the other pages of the document as empty pages. numbers: of the pages to read."""
    pages = dict(zip(numbers, attempt.pages, strict=False))
    return replace(attempt, pages=[pages.get(number, "") for number in range(num_pages)], is_sample=True)


def may_be_better(sample: Attempt, first: Attempt) -> bool:
    """True if the sample has the better text. Only pages count on which both attempts have text."""
    pairs = [pair for pair in zip(sample.pages, first.pages, strict=True) if all(map(str.strip, pair))]
    candidate, best = (replace(attempt, pages=[pair[i] for pair in pairs]) for i, attempt in enumerate((sample, first)))
    return sample.outcome == COMPLETE and _is_better(candidate, best)


def best_attempt(attempts: Sequence[Attempt]) -> Attempt | None:
    """Returns the attempt with the best text; None if no text is readable.

    A complete attempt is better than a partial one. Of partial attempts the longest is best. Of complete attempts the
    one with the fewest word errors is best; the first engine wins if the difference is small. A sample has no more than
    the pages that are empty in the others.
    """
    attempts = [_without_codes(attempt) for attempt in attempts]
    readable = [attempt for attempt in attempts if is_readable(_text(attempt))]
    complete = [attempt for attempt in readable if attempt.outcome == COMPLETE]
    if not complete:
        return max(readable, key=lambda attempt: len(_text(attempt)), default=None)
    best, *candidates = (attempt for attempt in complete if not attempt.is_sample)
    for candidate in candidates:
        if _is_better(candidate, best):
            best = candidate
    return _fill_empty_pages(best, complete)


def _without_codes(attempt: Attempt) -> Attempt:
    """Removes the text of pages whose font has no Unicode map. The other pages can be readable."""
    return replace(attempt, pages=["" if has_codes(page) else page for page in attempt.pages])


def _is_better(candidate: Attempt, best: Attempt) -> bool:
    candidate_text, text = _text(candidate), _text(best)
    if is_right_to_left(text) and RIGHT_TO_LEFT_ENGINE in (candidate.engine, best.engine):
        return candidate.engine == RIGHT_TO_LEFT_ENGINE
    if _num_characters(candidate_text) < MIN_TEXT_SHARE * _num_characters(text):
        return False
    if _num_characters(text) < MIN_TEXT_SHARE * _num_characters(candidate_text):
        return True
    num_errors, num_candidate_errors = num_word_errors(text, candidate_text)
    is_different = num_errors - num_candidate_errors > MIN_DIFFERENCE * len(text.split())
    return is_different and num_candidate_errors <= CLEARLY_FEWER * num_errors


def _fill_empty_pages(best: Attempt, attempts: Sequence[Attempt]) -> Attempt:
    """Takes the pages that are empty in the best attempt from the other attempts."""
    pages = []
    for number, page in enumerate(best.pages):
        others = [attempt.pages[number] for attempt in attempts if attempt.pages[number:]]
        pages.append(next((text for text in [page, *others] if text.strip()), ""))
    return replace(best, pages=pages)


def pages_for_ocr(attempts: Sequence[Attempt], best: Attempt | None, max_pages: int) -> list[int]:
    """Returns the numbers of the pages that have no readable text. OCR can read them if an engine opens the file.

    The header of a page does not count: a library stamps the same line on each page of a scan.
    """
    num_pages = next((a.num_pages for a in attempts if a.outcome == COMPLETE and a.num_pages is not None), None)
    if num_pages is None or any(attempt.is_placeholder for attempt in attempts):
        return []
    numbers = range(min(num_pages, max_pages))
    if best is None:
        return list(numbers)
    bodies, _ = cleaning.page_bodies(best.pages)
    return [number for number in numbers if not bodies[number:] or not any(map(str.isalnum, "".join(bodies[number])))]


def add_ocr(best: Attempt | None, ocr: Attempt, numbers: Sequence[int]) -> Attempt:
    """Returns the best attempt with the OCR text of the pages `numbers`."""
    if best is None:
        return ocr
    pages = best.pages + [""] * (max(numbers) + 1 - len(best.pages))
    for number, page in zip(numbers, ocr.pages, strict=False):  # a stopped OCR has fewer pages
        if page.strip():
            pages[number] = page
    return replace(best, pages=pages)


def judge(
    attempts: Sequence[Attempt], best: Attempt | None, *, pages_ocr: int, clean: bool, min_characters: int
) -> Extraction:
    """Returns the cleaned text of the best attempt, or the reason why the document is left out."""
    raw = _text(best) if best else ""
    cleaned = cleaning.clean(best.pages) if best and clean else cleaning.CleanText(raw, {})
    has_text = any(map(str.isalnum, cleaned.text))
    reason = _reason(attempts, best, has_text=has_text, is_long_enough=len(cleaned.text) >= min_characters)
    return Extraction(
        num_pages=next((a.num_pages for a in attempts if a.num_pages is not None), None),
        pages_read=len(best.pages) if best else 0,
        engine=best.engine if best else None,
        attempts={attempt.engine: attempt.outcome for attempt in attempts},
        characters_raw=len(raw),
        text=cleaned.text if reason is None else "",
        reason=reason,
        pages_ocr=pages_ocr,
        pages_reordered=best.pages_reordered if best else 0,
        pages_unreadable=_num_unreadable(attempts, best) if best else 0,
        removed=cleaned.removed,
        language=detect_language(cleaned.text) if reason is None else None,
    )


def _reason(
    attempts: Sequence[Attempt], best: Attempt | None, *, has_text: bool, is_long_enough: bool
) -> Reason | None:
    """Returns why a document is left out, or None. has_text: the best attempt has more than headers.

    If no engine was complete: ENCRYPTED if one engine says so, else the reason of the first one that did not crash.
    """
    if any(attempt.is_placeholder for attempt in attempts):
        return Reason.PLACEHOLDER
    if best and is_long_enough:
        return None
    complete = [attempt for attempt in attempts if attempt.outcome == COMPLETE]
    if any(attempt.num_attachments for attempt in attempts):
        return Reason.ONLY_ATTACHMENTS
    if best and best.outcome == COMPLETE:
        return Reason.TOO_SHORT if has_text else Reason.NO_TEXT_LAYER
    if complete:
        has_unreadable_text = any(page.strip() for attempt in complete for page in attempt.pages)
        return Reason.UNREADABLE_FONT if has_unreadable_text else Reason.NO_TEXT_LAYER
    reasons = [Reason(attempt.outcome) for attempt in attempts]
    return min(reasons, key=lambda reason: (reason != Reason.ENCRYPTED, reason == Reason.CRASHED))


def _num_unreadable(attempts: Sequence[Attempt], best: Attempt) -> int:
    """Returns the number of pages without text in the best attempt that have codes in another attempt."""
    return sum(
        not page.strip() and any(has_codes(attempt.pages[number]) for attempt in attempts if attempt.pages[number:])
        for number, page in enumerate(best.pages)
    )


def _text(attempt: Attempt) -> str:
    return "\n".join(attempt.pages)


def _num_characters(text: str) -> int:
    return len("".join(text.split()))
