"""Makes the demo corpus: texts/*.md -> data/pdfs/demo, 36 readable documents by theme, and the hard cases.

    python -m demo.corpus.make_pdfs

A second run writes the same bytes.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from demo.corpus.article import Article, read_article
from demo.corpus.fonts import register_fonts
from demo.corpus.hard_cases import make_broken, make_cover, make_scan
from demo.corpus.layout import AGENCY, BULLETIN, JOURNAL, STYLES, typeset

TEXTS = Path(__file__).parent / "texts"
PDFS = Path("data/pdfs/demo")
PASSWORD = "hectopascal"


def theme(article: Article) -> str:
    match article.number:
        case n if n <= 11 or n == 36:
            return "science"
        case n if n <= 18 or n >= 31:
            return "mitigation"
        case n if n <= 24:
            return "adaptation"
        case _:
            return "machine-learning"


def readable_pdf(article: Article) -> Path:
    return PDFS / theme(article) / f"{article.name}.pdf"


def make_hard_cases(articles: dict[int, Article]) -> None:
    """Seven documents that the pipeline must leave out or recognize as duplicates."""
    folder = PDFS / "hard-cases"
    folder.mkdir(parents=True, exist_ok=True)
    make_scan(readable_pdf(articles[12]), folder / "scanned.pdf")
    typeset(articles[33], JOURNAL, folder / "encrypted.pdf", password=PASSWORD)
    make_broken(readable_pdf(articles[7]), folder / "broken.pdf")
    make_cover(folder / "cover-only.pdf")
    shutil.copyfile(readable_pdf(articles[4]), folder / "exact-copy.pdf")
    # A new title, two new paragraphs, a few reworded sentences, another style.
    revised = read_article(TEXTS / "revised" / "22-cities-and-heat.md")
    typeset(revised, BULLETIN, folder / "second-edition.pdf")
    # Without a Unicode map in its fonts, a PDF engine returns "7KH" for "The".
    typeset(articles[18], replace(AGENCY, family="Shifted"), folder / "unmapped-font.pdf")


def main() -> None:
    register_fonts()
    articles = [read_article(path) for path in sorted(TEXTS.glob("*.md"))]
    for article in articles:
        target = readable_pdf(article)
        target.parent.mkdir(parents=True, exist_ok=True)
        num_pages = typeset(article, STYLES[article.number % len(STYLES)], target)
        print(f"{target}: {num_pages} pages")
    make_hard_cases({article.number: article for article in articles})


if __name__ == "__main__":
    main()
