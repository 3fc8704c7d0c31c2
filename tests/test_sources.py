"""Files of a corpus. Archives are in test_archives.py."""

import hashlib
from pathlib import Path

import fsspec
import pytest

from pdf2lora.documents.sources import Source, corpus_state, hash_source, list_corpus, local_file, require_sources
from pdf2lora.errors import InputError


def ids(folder: Path) -> list[str]:
    return [source.id for source in list_corpus(folder).sources]


def test_pdfs_are_found_in_sub_folders_and_sorted(tmp_path: Path) -> None:
    for name in ("b.pdf", "a/z.PDF", "a/notes.txt", "c.pdf.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.pdf").mkdir()
    assert ids(tmp_path) == ["a/z.PDF", "b.pdf"]


def test_a_folder_without_pdfs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no \.pdf file"):
        require_sources(tmp_path, list_corpus(tmp_path))


def test_a_linked_folder_is_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.pdf").touch()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    listing = list_corpus(corpus)
    assert listing.unread == [
        f"the linked folder {corpus}/linked is not read, because DVC does not track its files. Copy them."
    ]
    with pytest.raises(InputError, match="The linked folder"):
        require_sources(corpus, listing)
    (corpus / "b.pdf").symlink_to(tmp_path / "elsewhere/a.pdf")
    assert ids(corpus) == ["b.pdf"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.7z", "A.RAR", "a.pdf.gz"])
def test_an_archive_without_access_by_position_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    [sentence] = list_corpus(tmp_path).unread
    assert sentence.startswith(f"{tmp_path}/{name} is not read")


@pytest.mark.parametrize("target", ["gone.pdf", "a.pdf"], ids=["gone", "loop"])
def test_a_link_to_no_file_is_no_document(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.pdf").symlink_to(target)
    assert ids(tmp_path) == []
    assert corpus_state(tmp_path) == {}


def test_git_lfs_pointers_are_counted(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.zip"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    listing = list_corpus(tmp_path)
    with pytest.raises(
        InputError, match=r"has no \.pdf file\..* 2 files in .* are only Git LFS pointers\. Run git lfs pull"
    ):
        require_sources(tmp_path, listing)


def test_other_documents_are_counted(tmp_path: Path) -> None:
    for name in ("a.docx", "b.docx", "c.txt", "d", "e.pdf", "f.pdf.dvc", ".gitignore", "._e.pdf"):
        (tmp_path / name).touch()
    assert ids(tmp_path) == ["e.pdf"]
    assert list_corpus(tmp_path).unread == [
        f"4 other files in {tmp_path} (.docx, .txt, d) are not read, because they do not end in .pdf."
    ]


def test_a_file_is_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"sea")
    with local_file(str(tmp_path), Source(Path("a.pdf"))) as file:
        assert file == tmp_path / "a.pdf"
    assert hash_source(tmp_path, Source(Path("a.pdf"))) == hashlib.sha256(b"sea").hexdigest()


def test_a_remote_file_is_copied_and_the_copy_is_deleted() -> None:
    name = "a::b *.pdf"  # special characters of fsspec's addresses
    fsspec.filesystem("memory").pipe(f"/bucket/sub/{name}", b"sea")
    with local_file("memory://bucket", Source(Path("sub") / name)) as file:
        assert file.read_bytes() == b"sea"
    assert not file.exists()
