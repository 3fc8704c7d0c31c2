"""PDFs and pages of a corpus."""

import zipfile
from pathlib import Path

from pdf2lora.documents.sources import Source, list_corpus
from pdf2lora.preflight.corpus import corpus, count_pages


def test_a_corpus_without_pdfs_is_a_problem(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    findings = corpus(tmp_path, list_corpus(tmp_path))
    assert [finding.level for finding in findings] == ["problem", "note"]
    assert "a.tar.gz is not read" in findings[1].text


def test_pdfs_in_archives_are_counted(tmp_path, pdfs):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(pdfs["plain"], "plain.pdf")
    [finding] = corpus(tmp_path, list_corpus(tmp_path))
    assert finding.level == "ok"
    assert finding.text.endswith("; 1 in archives")
    assert count_pages(tmp_path, list_corpus(tmp_path).sources, 30) == 3


def test_pages_of_damaged_files_do_not_count(pdfs):
    assert count_pages(Path(), [Source(pdfs["plain"]), Source(pdfs["no_pdf"])], 30) == 3
    assert count_pages(Path(), [Source(pdfs["plain"])], 2) == 2
