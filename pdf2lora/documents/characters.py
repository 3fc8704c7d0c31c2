"""Clean characters: ligatures, presentation forms, control characters and spaces of one page."""

import re
import unicodedata
from functools import cache

from pdf2lora.documents.text import CJK, CJK_PUNCTUATION

# TeX's OT1 fonts keep the f-ligatures at these codes. An engine without the font's map returns the codes.
OT1_LIGATURES = {"\x0b": "ff", "\x0c": "fi", "\r": "fl", "\x0e": "ffi", "\x0f": "ffl"}
OT1_CONTEXT = re.compile("[a-z][\x0b\x0c\x0e\x0f]|[\x0b\x0c\x0e\x0f][a-z]")
OT1_CODE = re.compile("(?<=[A-Za-z])[\x0b\x0c\r\x0e\x0f]|[\x0b\x0c\r\x0e\x0f](?=[a-z])")

# The hyphen at a line end: pdfium writes U+0002 or U+FFFE, some fonts a soft hyphen, some OCR programs a not sign.
LINE_END_HYPHEN = re.compile(r"[\x02\ufffe]\n?|\u00ad\n|(?<=[^\W\d_])¬[^\S\n]*\n")

# Some characters are only another form of a letter: letters of mathematical fonts, Arabic letter forms, half-width and
# vertical forms, no-break space and hyphen. Their decomposition in Unicode has one of these tags. Characters with other
# tags have a meaning (superscripts, fractions, full-width punctuation), which NFKC would destroy: 10³ -> 103.
FORM_TAGS = {"<font>", "<initial>", "<medial>", "<final>", "<isolated>", "<narrow>", "<vertical>", "<noBreak>"}
LIGATURES_AND_RADICALS = re.compile("[\u01c4-\u01cc\ufb00-\ufb06\ufb13-\ufb17\u2e80-\u2fdf]")
# The NFKC of a separate Arabic vowel mark is the mark after a space or a tatweel. The word does not have these two.
ARABIC_MARK_PLACES = " \u0640"
# These format characters are visible: they enclose numbers (Arabic, Syriac, Kaithi). Persian and Indic scripts need the
# two joiners.
KEPT_FORMATS = {*"\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd\u200c\u200d"}
ARABIC_PHRASES = re.compile("[\ufdf0-\ufdff]")

# The signs of symbol fonts (Symbol, Wingdings) have only private codes. At the start of a line they are bullets.
SYMBOL_BULLET = re.compile(r"^[^\S\n]*[\uf000-\uf0ff](?![\ue000-\uf8ff])", re.MULTILINE)

DOT_LEADER = re.compile(r"(?:[.…·_]\s*){5,}|(?:…\s*){3,}")
_SPACE_AT_CJK_PUNCTUATION = re.compile(rf" (?=[{CJK_PUNCTUATION}])|(?<=[{CJK_PUNCTUATION}]) ")
_SPACED_OUT_CJK = re.compile(rf"(?<![{CJK}])[{CJK}](?: [{CJK}]){{2,}}(?![{CJK}])")


def clean_characters(page: str) -> tuple[str, int]:
    """Returns the page in NFC with line ends \\n, and the number of removed characters.

    Removes control, invisible and private-use characters and U+FFFD. Line-end hyphens become `-\\n`.
    """
    page = page.replace("\r\n", "\n").strip("\f\r\n")
    if OT1_CONTEXT.search(page):  # without OT1 codes, \r alone is a line end
        page = OT1_CODE.sub(lambda match: OT1_LIGATURES[match[0]], page)
    page = LINE_END_HYPHEN.sub("-\n", page.replace("\r", "\n"))
    page = SYMBOL_BULLET.sub("• ", page)
    page = unicodedata.normalize("NFC", page)
    removed = [character for character in set(page) if not (character.isspace() or _replacement(character).strip())]
    num_removed = sum(map(page.count, removed))
    page = page.translate({ord(character): _replacement(character) for character in set(page)})
    return unicodedata.normalize("NFC", page), num_removed


@cache
def _replacement(character: str) -> str:
    match unicodedata.category(character):
        case "Cc":
            return character if character == "\n" else "" if character == "\0" else " "
        case "Cf":
            return character if character in KEPT_FORMATS else ""
        case "Co" | "Cn" | "Cs":
            return ""
        case "Zs" | "Zl" | "Zp":
            return " "
        case _:
            return " " if character == "\ufffd" else _plain_form(character)


def _plain_form(character: str) -> str:
    if character in "\u2010\u2011":
        return "-"
    tag = unicodedata.decomposition(character).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", character)
    is_form = tag in FORM_TAGS and not ARABIC_PHRASES.match(character)
    is_wide_letter = tag == "<wide>" and plain.isalnum()
    if is_form:
        return plain.strip(ARABIC_MARK_PLACES)
    return plain if is_wide_letter or LIGATURES_AND_RADICALS.match(character) else character


def collapse_spaces(line: str) -> tuple[str, int]:
    """Puts one space between words and none inside Chinese and Japanese text.

    Returns the line and the number of removed dot leaders and fill-in blanks.
    """
    num_leaders = 0
    if sum(map(line.count, ".…·_")) >= 3:
        line, num_leaders = DOT_LEADER.subn(" ", line)
    line = " ".join(line.split())
    if not line.isascii():
        line = _SPACE_AT_CJK_PUNCTUATION.sub("", line)
        line = _SPACED_OUT_CJK.sub(lambda match: match[0].replace(" ", ""), line)
    return line, num_leaders
