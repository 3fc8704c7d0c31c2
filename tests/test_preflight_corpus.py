"""PDFs and pages of a corpus."""

from pdf2lora.preflight.corpus import corpus, count_pages, find_pdfs


def test_pdfs_are_found_in_subfolders_too(tmp_path):
    for name in ("b.pdf", "sub/a.PDF", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert find_pdfs(tmp_path) == [tmp_path / "b.pdf", tmp_path / "sub/a.PDF"]


def test_a_corpus_without_pdfs_is_a_problem(tmp_path):
    assert corpus(tmp_path, []).level == "problem"


def test_pages_of_damaged_files_do_not_count(pdfs):
    assert count_pages([pdfs["plain"], pdfs["no_pdf"]], 30) == 3
    assert count_pages([pdfs["plain"]], 2) == 2
