"""Clean text from a document's pages: no headers, footers, page numbers, ligatures, hyphenation or line breaks.

A PDF engine returns the text as the page shows it. Ligatures are one character (or a TeX control code), words are
hyphenated at line ends, every printed line ends in a line break, and every page repeats its header. A language model
would learn all of it.
"""

import re
import unicodedata
from collections import Counter

# TeX's OT1 fonts keep the f-ligatures at these codes. An engine without the font's map returns the codes.
OT1_LIGATURES = {"\x0b": "ff", "\x0c": "fi", "\r": "fl", "\x0e": "ffi", "\x0f": "ffl"}
OT1_CONTEXT = re.compile("[a-z][\x0b\x0c\x0e\x0f]|[\x0b\x0c\x0e\x0f][a-z]")
OT1_CODE = re.compile("(?<=[A-Za-z])[\x0b\x0c\r\x0e\x0f]|[\x0b\x0c\r\x0e\x0f](?=[a-z])")

# The hyphen at a line end: pdfium writes U+0002 or U+FFFE, some fonts write a soft hyphen.
LINE_END_HYPHEN = re.compile("[\x02\ufffe]\n?|\u00ad\n")

EDGE_LINES = 3  # running headers and footers are among the first and last three lines of a page
RUNNING_SHARE = 0.4  # they are on at least 40% of the pages (left and right pages can differ)
SHORT_LINE = 0.6  # a line shorter than 60% of the longest line near it can end a paragraph

_PAGE_NUMBER = re.compile(r"\W*(?:page|p\.)?\s*(?:\d{1,4}|[ivx]{1,6})(?:\s*(?:of|/)\s*\d{1,4})?\W*", re.IGNORECASE)
_LIST_ITEM = re.compile(r"[-–•▪◦*]\s|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]\s")
_DOT_LEADER = re.compile(r"(?:[.…·_]\s*){5,}")

# The match starts at the first letter of a word. A match from every letter would take hours for a very long word.
_HYPHENATED_WORD = re.compile(r"(-?)(?<![^\W\d_])([^\W\d_]+)-\n(?=(\w+))")


def clean(pages: list[str]) -> str:
    """Returns one text: one line per paragraph, a blank line between paragraphs, Unicode form NFKC.

    Idempotent: `clean([text])` returns a cleaned text unchanged.
    """
    lines = [_clean_characters(page).split("\n") for page in pages]
    body = "\n".join(line for page in _remove_running_lines(lines) for line in page)
    return unicodedata.normalize("NFKC", "\n\n".join(_paragraphs(_join_hyphenated(body).split("\n"))))


def _clean_characters(page: str) -> str:
    """Returns the page in NFKC, without ligatures, control characters and unreadable characters."""
    page = page.replace("\r\n", "\n").strip("\f\r\n")
    if OT1_CONTEXT.search(page):  # without OT1 codes, \r alone is a line end
        page = OT1_CODE.sub(lambda match: OT1_LIGATURES[match[0]], page)
    page = LINE_END_HYPHEN.sub("-\n", page.replace("\r", "\n"))
    page = unicodedata.normalize("NFKC", page).replace("\u2010", "-")
    page = page.translate({ord(character): _replacement(character) for character in set(page)})
    return "\n".join(_collapse_spaces(line) for line in page.split("\n"))


def _replacement(character: str) -> str:
    match unicodedata.category(character):
        case "Cc":
            return character if character == "\n" else "" if character == "\0" else " "
        case "Cf":  # invisible characters; Persian and Indic scripts need the two joiners
            return character if character in "\u200c\u200d" else ""
        case "Co" | "Cn" | "Cs":
            return ""
        case _:
            return " " if character == "\ufffd" else character


def _collapse_spaces(line: str) -> str:
    """Puts one space between words; removes dot leaders and fill-in blanks."""
    return " ".join(_DOT_LEADER.sub(" ", line).split())


def _remove_running_lines(pages: list[list[str]]) -> list[list[str]]:
    """Removes headers, footers and page numbers at both ends of each page. A single page keeps all its lines."""
    if len(pages) < 2:
        return pages
    num_pages_with = Counter(key for page in pages for key in {*_keys(page[:EDGE_LINES]), *_keys(page[-EDGE_LINES:])})
    running = {key for key, count in num_pages_with.items() if count >= max(2, RUNNING_SHARE * len(pages))}

    def is_running(line: str) -> bool:
        return not line or _PAGE_NUMBER.fullmatch(line) is not None or _key(line) in running

    bodies = []
    for page in pages:
        first, last = 0, len(page)
        while first < min(EDGE_LINES, last) and is_running(page[first]):
            first += 1
        while last > max(first, len(page) - EDGE_LINES) and is_running(page[last - 1]):
            last -= 1
        bodies.append(page[first:last])
    return bodies


def _keys(lines: list[str]) -> list[str]:
    return [_key(line) for line in lines if line]


def _key(line: str) -> str:
    """Two headers that differ only in their numbers have the same key."""
    return re.sub(r"\d+", "#", line).casefold()


def _join_hyphenated(text: str) -> str:
    """Joins the words that are hyphenated at line ends. Keeps the hyphen of a compound that the text has elsewhere."""
    compounds = {compound.casefold() for compound in re.findall(r"\b(?=([^\W\d_]+-[^\W\d_]+))", text)}

    def join(match: re.Match[str]) -> str:
        hyphen_before, start, rest = match.groups()
        is_compound = (
            hyphen_before or rest[0].isupper() or rest[0].isdigit() or f"{start}-{rest}".casefold() in compounds
        )
        return f"{hyphen_before}{start}{'-' if is_compound else ''}"

    return _HYPHENATED_WORD.sub(join, text)


def _paragraphs(lines: list[str]) -> list[str]:
    """Joins printed lines to paragraphs. A blank line, a list item or a short line ends the paragraph before it."""
    paragraphs: list[list[str]] = []
    is_new = True
    for number, line in enumerate(lines):
        if not line:
            is_new = True
            continue
        if is_new or _LIST_ITEM.match(line):
            paragraphs.append([line])
        else:
            paragraphs[-1].append(line)
        following = lines[number + 1] if number + 1 < len(lines) else ""
        longest_near = max(map(len, lines[max(0, number - 3) : number + 4]))
        is_short = len(line) < SHORT_LINE * longest_near
        is_new = is_short and (line[-1] in '.!?:;”"' or not following[:1].islower())
    joined = (_collapse_spaces(" ".join(lines)) for lines in paragraphs)  # a dot leader can start on one line and go on
    return [paragraph for paragraph in joined if paragraph]
