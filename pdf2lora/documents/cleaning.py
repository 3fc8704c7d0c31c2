"""Page text -> clean text: what the page layout put into the words is taken out again.

PDF engines give back what stands on the page: ligatures as one character (or as TeX's control codes), words cut at
the end of a line, a line break for every printed line, and the same header on every page. A language model would
learn all of it.
"""

import re
import unicodedata
from collections import Counter

# TeX's OT1 fonts keep the f-ligatures at these codes; an engine without the font's map passes the codes on.
OT1_LIGATURES = {"\x0b": "ff", "\x0c": "fi", "\r": "fl", "\x0e": "ffi", "\x0f": "ffl"}


# What engines write for a hyphen and the line break after it: pdfium U+0002 or U+FFFE, some fonts a soft hyphen.
CUT = re.compile("[\x02\ufffe]\n?|\u00ad\n")


EDGE_LINES = 3  # running headers and footers stand within so many lines of a page's ends ...


RUNNING_SHARE = 0.4  # ... on this share of the pages at least (left and right pages may differ)


SHORT_LINE = 0.6  # of the longest line near it: a shorter one may end a paragraph


_PAGE_NUMBER = re.compile(r"\W*(?:page|p\.)?\s*(?:\d{1,4}|[ivx]{1,6})(?:\s*(?:of|/)\s*\d{1,4})?\W*", re.IGNORECASE)


_LIST_ITEM = re.compile(r"[-–•▪◦*]\s|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]\s")


# From the word's first letter on: tried at each letter, a word of a million letters would take hours.
_CUT_WORD = re.compile(r"(-?)(?<![^\W\d_])([^\W\d_]+)-\n(?=(\w+))")


def clean(pages: list[str]) -> str:
    """One text from a document's pages: a paragraph a line, a blank line between paragraphs, Unicode NFKC.

    A cleaned text given again as one page comes back unchanged.
    """
    lines = [_characters(page).split("\n") for page in pages]
    body = "\n".join(line for page in _remove_running_lines(lines) for line in page)
    return unicodedata.normalize("NFKC", "\n\n".join(_paragraphs(_join_hyphenated(body).split("\n"))))


def _characters(page: str) -> str:
    """Every character as plain text: NFKC, ligatures and line ends resolved, what cannot be read removed."""
    page = page.replace("\r\n", "\n").strip("\f\r\n")
    if re.search("[a-z][\x0b\x0c\x0e\x0f]|[\x0b\x0c\x0e\x0f][a-z]", page):  # else a lone \r is an old line end
        page = re.sub(
            "(?<=[A-Za-z])[\x0b\x0c\r\x0e\x0f]|[\x0b\x0c\r\x0e\x0f](?=[a-z])", lambda m: OT1_LIGATURES[m[0]], page
        )
    page = CUT.sub("-\n", page.replace("\r", "\n"))
    page = unicodedata.normalize("NFKC", page).replace("\u2010", "-")
    page = page.translate({ord(c): _replacement(c) for c in set(page)})
    return "\n".join(_spaced(line) for line in page.split("\n"))


def _replacement(character: str) -> str:
    match unicodedata.category(character):
        case "Cc":
            return character if character == "\n" else "" if character == "\0" else " "
        case "Cf":  # invisible marks; the joiners spell words in Persian and Indic scripts
            return character if character in "\u200c\u200d" else ""
        case "Co" | "Cn" | "Cs":
            return ""
        case _:
            return " " if character == "\ufffd" else character


def _spaced(line: str) -> str:
    """Words one blank apart, without dot leaders and blanks to fill in."""
    return " ".join(re.sub(r"(?:[.…·_]\s*){5,}", " ", line).split())


def _remove_running_lines(pages: list[list[str]]) -> list[list[str]]:
    """Headers, footers and page numbers taken off both ends of each page; a single page keeps all its lines."""
    if len(pages) < 2:
        return pages
    on_pages = Counter(key for page in pages for key in {*_keys(page[:EDGE_LINES]), *_keys(page[-EDGE_LINES:])})
    running = {key for key, count in on_pages.items() if count >= max(2, RUNNING_SHARE * len(pages))}

    def is_running(line: str) -> bool:
        return not line or _PAGE_NUMBER.fullmatch(line) is not None or _key(line) in running

    kept = []
    for page in pages:
        first, last = 0, len(page)
        while first < min(EDGE_LINES, last) and is_running(page[first]):
            first += 1
        while last > max(first, len(page) - EDGE_LINES) and is_running(page[last - 1]):
            last -= 1
        kept.append(page[first:last])
    return kept


def _keys(lines: list[str]) -> list[str]:
    return [_key(line) for line in lines if line]


def _key(line: str) -> str:
    """Page 7's header is page 8's: their numbers differ."""
    return re.sub(r"\d+", "#", line).casefold()


def _join_hyphenated(text: str) -> str:
    """Joins words that were cut at a line's end; the hyphen stays where the document writes that compound elsewhere."""
    compounds = {compound.casefold() for compound in re.findall(r"\b(?=([^\W\d_]+-[^\W\d_]+))", text)}

    def whole(cut: re.Match[str]) -> str:
        hyphen_before, start, rest = cut.groups()
        is_compound = (
            hyphen_before or rest[0].isupper() or rest[0].isdigit() or f"{start}-{rest}".casefold() in compounds
        )
        return f"{hyphen_before}{start}{'-' if is_compound else ''}"

    return _CUT_WORD.sub(whole, text)


def _paragraphs(lines: list[str]) -> list[str]:
    """Printed lines put together to paragraphs: at a blank line, a list item and after a short line one ends."""
    paragraphs: list[list[str]] = []
    ended = True
    for number, line in enumerate(lines):
        if not line:
            ended = True
            continue
        if ended or _LIST_ITEM.match(line):
            paragraphs.append([line])
        else:
            paragraphs[-1].append(line)
        following = lines[number + 1] if number + 1 < len(lines) else ""
        longest_near = max(map(len, lines[max(0, number - 3) : number + 4]))
        short = len(line) < SHORT_LINE * longest_near
        ended = short and (line[-1] in '.!?:;”"' or not following[:1].islower())
    joined = (_spaced(" ".join(lines)) for lines in paragraphs)  # two lines may make one dot leader
    return [paragraph for paragraph in joined if paragraph]
