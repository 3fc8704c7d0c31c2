"""Makes the demo corpus: texts/*.md -> data/pdfs/demo, 36 readable documents by theme, and the hard cases.

    python -m demo.corpus.make_pdfs

A second run writes the same bytes.
"""

from pathlib import Path

from demo.corpus import hard_cases
from demo.corpus.article import Article, read_article
from demo.corpus.fonts import register_fonts
from demo.corpus.layout import STYLES, typeset

TEXTS = Path(__file__).parent / "texts"
PDFS = Path("data/pdfs/demo")


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
    folder = PDFS / "hard-cases"
    folder.mkdir(parents=True, exist_ok=True)
    hard_cases.make_scan(readable_pdf(articles[12]), folder / "scanned.pdf")
    hard_cases.make_encrypted(articles[33], folder / "encrypted.pdf")
    hard_cases.make_broken(readable_pdf(articles[7]), folder / "broken.pdf")
    hard_cases.make_cover(folder / "cover-only.pdf")
    hard_cases.make_exact_copy(readable_pdf(articles[4]), folder / "exact-copy.pdf")
    revised = read_article(TEXTS / "revised" / "22-cities-and-heat.md")
    hard_cases.make_second_edition(revised, folder / "second-edition.pdf")
    hard_cases.make_unmapped(articles[18], folder / "unmapped-font.pdf")


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
