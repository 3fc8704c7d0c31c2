"""The fonts of the corpus. Some make text extraction difficult on purpose: they have ligatures or no Unicode map.

All have the SIL Open Font License, which allows embedding and redistribution. They come from the Debian packages
fonts-sil-gentiumplus, fonts-sil-charis, fonts-crosextra-carlito and fonts-liberation2.
"""

from pathlib import Path

from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.pdfdoc import PDFDocument
from reportlab.pdfbase.ttfonts import TTFont

TRUETYPE = Path("/usr/share/fonts/truetype")
FULL_LIGATURES = {"ffi": "\ufb03", "ffl": "\ufb04", "ff": "\ufb00", "fi": "\ufb01", "fl": "\ufb02"}  # longest first
TWO_LIGATURES = {"fi": "\ufb01", "fl": "\ufb02"}

ASCII = range(ord(" "), ord("~") + 1)
SHIFTED_CODES = {char: char - 29 for char in ASCII}
TEX_CODES = {char: char for char in ASCII} | {0xFB00: 0x0B, 0xFB01: 0x0C, 0xFB02: 0x0D, 0xFB03: 0x0E, 0xFB04: 0x0F}


class LigatureFont(TTFont):
    """A TrueType font with ligatures. They replace letters after hyphenation, when text is measured and drawn."""

    def __init__(self, name: str, path: Path, ligatures: dict[str, str]) -> None:
        super().__init__(name, str(path), shapable=False)
        self.ligatures = ligatures

    def join(self, text: str) -> str:
        for letters, ligature in self.ligatures.items():
            text = text.replace(letters, ligature)
        return text

    def stringWidth(self, text: str, size: float, encoding: str = "utf8") -> float:
        return super().stringWidth(self.join(text), size, encoding)

    def splitString(self, text: str, doc: PDFDocument, encoding: str = "utf-8") -> list[tuple[int, bytes]]:
        return super().splitString(self.join(text), doc, encoding)


class UnmappedFont(LigatureFont):
    """A TrueType font without a ToUnicode map. A PDF engine returns its codes instead of characters.

    codes: character -> code. TEX_CODES keep ASCII; only the ligatures become control characters, as in TeX's OT1
    encoding. SHIFTED_CODES are like the glyph numbers of some printer drivers; no character is readable. All other
    characters use a second font with a ToUnicode map.
    """

    def __init__(self, name: str, path: Path, ligatures: dict[str, str], codes: dict[int, int]) -> None:
        super().__init__(name, path, ligatures)
        self.codes = codes

    def splitString(self, text: str, doc: PDFDocument, encoding: str = "utf-8") -> list[tuple[int, bytes]]:
        if doc not in self.state:
            state = self._assignState(doc)
            chars = {code: char for char, code in self.codes.items()}
            state.assignments = dict(self.codes)
            state.subsets = [[chars.get(code, 0) for code in range(256)]]
            state.nextCode = 256
        return super().splitString(text, doc, encoding)

    def addObjects(self, doc: PDFDocument) -> None:
        unmapped = self.getSubsetInternalName(0, doc).removeprefix("/")
        super().addObjects(doc)
        del doc.idToObject["BasicFonts"].dict[unmapped].ToUnicode


def register_fonts() -> None:
    """Registers five families with reportlab: Gentium, Charis, Carlito, Liberation and Shifted."""
    for weight in ("Regular", "Bold", "Italic"):
        fonts = (
            LigatureFont(f"Gentium-{weight}", TRUETYPE / f"gentiumplus/GentiumBookPlus-{weight}.ttf", FULL_LIGATURES),
            LigatureFont(f"Carlito-{weight}", TRUETYPE / f"crosextra/Carlito-{weight}.ttf", {}),
            LigatureFont(f"Liberation-{weight}", TRUETYPE / f"liberation2/LiberationSerif-{weight}.ttf", TWO_LIGATURES),
            UnmappedFont(f"Charis-{weight}", TRUETYPE / f"charis/CharisSIL-{weight}.ttf", FULL_LIGATURES, TEX_CODES),
            UnmappedFont(f"Shifted-{weight}", TRUETYPE / f"liberation2/LiberationSans-{weight}.ttf", {}, SHIFTED_CODES),
        )
        for font in fonts:
            pdfmetrics.registerFont(font)
    for family in ("Gentium", "Carlito", "Liberation", "Charis", "Shifted"):
        pdfmetrics.registerFontFamily(f"{family}-Regular", f"{family}-Regular", f"{family}-Bold", f"{family}-Italic")
