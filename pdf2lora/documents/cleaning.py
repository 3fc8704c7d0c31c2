"""Clean text from a document's pages: no headers, footers, page numbers, ligatures, hyphenation or line breaks.

A PDF engine returns the text as the page shows it. Ligatures are one character (or a TeX control code), words are
hyphenated at line ends, every printed line ends in a line break, and every page repeats its header. A language model
would learn all of it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from pdf2lora.documents.characters import clean_characters, collapse_spaces
from pdf2lora.documents.line_numbers import remove_line_numbers
from pdf2lora.documents.running_lines import remove_running_lines
from pdf2lora.documents.text import CJK_PUNCTUATION, UNSPACED

SHORT_LINE = 0.6  # a line shorter than 60% of the longest line near it can end a paragraph
PARAGRAPH_ENDS = '.!?:;”"。！？：；」』'

_BULLETS = "•▪◦●○■□▸►▶➢➤❖✓✔‣⁃∙·"
_LIST_ITEM = re.compile(rf"[-–*{_BULLETS}]\s|[{_BULLETS}]$|\(?(?:\d{{1,3}}|[A-Za-z]|[ivx]{{1,4}})[.)]\s")

_INITIAL = re.compile(r"[A-Z]\.\s")
_BEFORE_INITIAL = re.compile(r"(?:[,&]|\band)$")  # Smith, P. and Jones, A. (2010): the initial is not a list item

# The match starts at the first letter of a word. A match from every letter would take hours for a very long word.
_HYPHENATED_WORD = re.compile(r"(-?)(?<![^\W\d_])([^\W\d_]+)-\n(?=(\w+)(-?)(?:\s[^\W\d_]+(-))?)")
# After a hyphen, they continue a list (short- and long-term, Ein- und Ausfuhr) or a compound (peer-to-peer).
_CONJUNCTIONS = {"and", "und", "oder", "sowie", "og", "och", "eller"}
_ALL_CONJUNCTIONS = _CONJUNCTIONS | {"or", "to"}  # these two are also the ends of words: equat-or
# Between two hyphens they are separate words: day-to-day is not day-today.
_LINKS = {"to", "in", "on", "of", "by", "for", "and", "or", "at", "the", "a", "à", "de", "en", "sur"}
_BEFORE_PARTS = {*"0123456789_.@=&"}  # before a part of a number, formula or address: 20th-century, N2O-rich
_BEFORE_LETTERS = {"", *" \n([“"}
_IN_ADDRESS = re.compile(r"\w[.:][\w/]\S*/$")  # www.example.org/sea-level
MAX_ADDRESS = 200  # characters of an address before a hyphen
# Hebrew, Arabic, Korean and the scripts without spaces do not break words with a hyphen. Their hyphens join two words.
_NEVER_HYPHENATED = re.compile(f"[\u0590-\u07ff\uac00-\ud7a3{UNSPACED}]")
# 1850-1900, CO2-equivalent, ocean–atmosphere, and/or and addresses are broken after the sign.
_BROKEN_AFTER_SIGN = re.compile(rf"(?<=[\w/.)+%°])([–—/]|-(?!\n(?:{'|'.join(_ALL_CONJUNCTIONS)})\b(?!-)))\n(?=\w)")

_LINE_BREAK_WITHOUT_SPACE = re.compile(rf"(?<=[{UNSPACED}{CJK_PUNCTUATION}])\n(?=[{UNSPACED}{CJK_PUNCTUATION}])")


@dataclass(frozen=True)
class CleanText:
    text: str
    removed: dict[str, int]  # headers, footers, page_numbers (lines), line_numbers, hyphens, characters, dot_leaders


def clean(pages: list[str]) -> CleanText:
    """Returns one text: one line per paragraph, a blank line between paragraphs, Unicode form NFC.

    Idempotent: `clean([text])` returns a cleaned text unchanged.
    """
    bodies, removed = page_bodies(pages)
    body = _join_hyphenated("\n".join(line for page in bodies for line in page), removed)
    text = unicodedata.normalize("NFC", "\n\n".join(_paragraphs(body.split("\n"), removed)))
    return CleanText(text, {kind: count for kind, count in sorted(removed.items()) if count})


def page_bodies(pages: list[str]) -> tuple[list[list[str]], Counter[str]]:
    """Returns the lines of each page without headers, footers, page numbers and line numbers, and what was removed."""
    removed: Counter[str] = Counter()
    lines = []
    for page in pages:
        characters, removed_characters = clean_characters(page)
        lines.append([_collapse(line, removed) for line in characters.split("\n")])
        removed["characters"] += removed_characters
    lines, removed["line_numbers"] = remove_line_numbers(lines)
    bodies, removed_lines = remove_running_lines(lines)
    return bodies, removed + removed_lines


def _collapse(line: str, removed: Counter[str]) -> str:
    line, num_leaders = collapse_spaces(line)
    removed["dot_leaders"] += num_leaders
    return line


def _join_hyphenated(text: str, removed: Counter[str]) -> str:
    """Joins words and numbers that are broken at line ends.

    If the text has the word or the compound elsewhere, the joined word has the same form: with or without the hyphen.
    If it has neither, the form is that of most of the other broken words: many programs break only at real hyphens.
    """
    folded = text.casefold()
    compounds = set(re.findall(r"\b(?=([^\W\d_]+-[^\W\d_]+))", folded))
    words = set(re.findall(r"[^\W\d_]+", folded))
    broken = [(match[2].casefold(), match[3].casefold()) for match in _HYPHENATED_WORD.finditer(text)]
    num_compounds = sum("-".join(parts) in compounds for parts in broken)
    breaks_mostly_compounds = num_compounds > sum("".join(parts) in words for parts in broken)

    def join(match: re.Match[str]) -> str:
        hyphen_before, start, rest, hyphen_after, next_hyphen = match.groups()
        before = text[max(0, match.start() - MAX_ADDRESS) : match.start()]
        is_in_address = before.endswith("/") and _IN_ADDRESS.search(before)
        is_letter = len(start) == 1 and before[-1:] in _BEFORE_LETTERS  # X-ray: a letter is not a syllable
        is_part = before[-1:] in _BEFORE_PARTS or is_in_address or is_letter or _NEVER_HYPHENATED.match(rest)
        is_link = (hyphen_before and start.casefold() in _LINKS) or (hyphen_after and rest.casefold() in _LINKS)
        is_word = f"{start}{rest}".casefold() in words and not is_link
        conjunctions = _ALL_CONJUNCTIONS if hyphen_after or next_hyphen else _CONJUNCTIONS
        has_conjunction = rest.casefold() in conjunctions and not is_word
        if has_conjunction and not hyphen_after:
            return f"{match[0][:-1]} "
        is_name = rest[0].isupper() or rest[0].isdigit()
        is_compound = f"{start}-{rest}".casefold() in compounds or (
            not is_word
            and (hyphen_before or is_part or is_link or is_name or has_conjunction or breaks_mostly_compounds)
        )
        removed["hyphens"] += not is_compound
        return f"{hyphen_before}{start}{'-' if is_compound else ''}"

    return _BROKEN_AFTER_SIGN.sub(r"\1", _HYPHENATED_WORD.sub(join, text))


def _continues_names(line: str, before: str) -> bool:
    return bool(_INITIAL.match(line) and _BEFORE_INITIAL.search(before))


def _paragraphs(lines: list[str], removed: Counter[str]) -> list[str]:
    """Joins printed lines to paragraphs. A blank line, a list item or a short line ends the paragraph before it."""
    paragraphs: list[list[str]] = []
    is_new = True
    for number, line in enumerate(lines):
        if not line:
            is_new = True
            continue
        if is_new or (_LIST_ITEM.match(line) and not _continues_names(line, lines[number - 1])):
            paragraphs.append([line])
        else:
            paragraphs[-1].append(line)
        following = lines[number + 1] if number + 1 < len(lines) else ""
        longest_near = max(map(len, lines[max(0, number - 3) : number + 4]))
        is_short = len(line) < SHORT_LINE * longest_near and line not in _BULLETS
        can_end = line[-1] in PARAGRAPH_ENDS or not following[:1].islower()
        is_new = is_short and can_end and not _continues_names(following, line)
    # A dot leader can start on one line and end on the next.
    joined = (_collapse(_LINE_BREAK_WITHOUT_SPACE.sub("", "\n".join(lines)), removed) for lines in paragraphs)
    return [paragraph for paragraph in joined if paragraph]
