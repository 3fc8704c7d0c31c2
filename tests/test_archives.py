"""PDFs in archives, and hostile archives."""

import io
import os
import random
import struct
import subprocess
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import prose
from tiny_pdfs import EXTRACT_SETTINGS, write_pdf

from pdf2lora.documents import archives
from pdf2lora.documents.archives import DamagedMember, list_members, read_member
from pdf2lora.documents.corpus import extract_corpus
from pdf2lora.documents.extraction import extract
from pdf2lora.documents.records import Document, Reason
from pdf2lora.documents.sources import hash_source, list_corpus
from pdf2lora.errors import InputError


def write_zip(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:  # 1: bombs of zeros need little time
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def write_tar(file: Path, members: dict[str, bytes], **attributes: Any) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(content))
    return file


def read_all(archive: Path) -> dict[str, bytes | str]:
    """The content of each PDF, or the reason why it is not read."""
    contents: dict[str, bytes | str] = {}
    with archive.open("rb") as stream:
        for member in list_members(archive)[0]:
            try:
                contents[member.name] = member.reason or b"".join(read_member(stream, member))
            except DamagedMember:
                contents[member.name] = "damaged"
    return contents


def extract_all(folder: Path, cache: Path, num_workers: int = 1) -> list[Document]:
    extract_some = partial(extract, num_workers=num_workers)
    return list(extract_corpus(folder, list_corpus(folder).sources, cache, EXTRACT_SETTINGS, extract_some))


WRITERS = [pytest.param(write_zip, "a.zip", id="zip"), pytest.param(write_tar, "a.tar", id="tar")]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_members_are_documents_with_the_text_of_the_loose_files(
    tmp_path: Path, pdfs: dict[str, Path], write: Any, name: str
) -> None:
    contents = {f"sub/{n}.pdf": write_pdf(tmp_path / "loose/sub" / f"{n}.pdf", [prose(n)]).read_bytes() for n in (2, 1)}
    contents["no.PDF"] = pdfs["no_pdf"].read_bytes()
    (tmp_path / "loose/no.PDF").write_bytes(contents["no.PDF"])
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / name, contents | {"notes.txt": b"no PDF"})

    num_workers = 2 if name == "a.zip" else 1  # 2: members are read in other processes
    documents = extract_all(tmp_path / "corpus", tmp_path / "cache", num_workers)

    assert [document.id for document in documents] == [f"{name}/no.PDF", f"{name}/sub/1.pdf", f"{name}/sub/2.pdf"]
    assert [document.reason for document in documents] == ["damaged", None, None]
    loose = extract_all(tmp_path / "loose", tmp_path / "other_cache")
    assert [(d.sha256, d.text) for d in documents] == [(d.sha256, d.text) for d in loose]
    assert list_corpus(tmp_path / "corpus").unread == [
        f"1 files in {tmp_path}/corpus/{name} are not read, because they do not end in .pdf."
    ]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_metadata_of_macos_is_no_document(tmp_path: Path, write: Any, name: str) -> None:
    archive = write(tmp_path / name, {"a.pdf": b"sea", "._a.pdf": b"", "__MACOSX/sub/._b.pdf": b""})
    members, num_others = list_members(archive)
    assert ([member.name for member in members], num_others) == (["a.pdf"], 0)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_large_members_are_read_in_pieces(tmp_path: Path, compression: int) -> None:
    content = random.Random(1).randbytes(5 * 2**20 + 7)
    archive = write_zip(tmp_path / "a.zip", {"a.pdf": content, "b.pdf": b""}, compression)
    assert read_all(archive) == {"a.pdf": content, "b.pdf": b""}
    [member, _] = list_members(archive)[0]
    with archive.open("rb") as stream:
        assert max(map(len, read_member(stream, member))) <= archives.CHUNK_BYTES


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize("path", ["../a.pdf", "/etc/a.pdf", "a/../../b.pdf", "..\\a.pdf", "C:/a.pdf"])
def test_a_path_out_of_the_archive_is_left_out(tmp_path: Path, write: Any, name: str, path: str) -> None:
    archive = write(tmp_path / name, {path: b"sea", "b.pdf": b"ice"})
    contents = read_all(archive)
    assert contents.pop("b.pdf") == b"ice"
    assert list(contents.values()) == ["unsafe_member"]
    assert all(source.id.startswith(f"{name}/") for source in list_corpus(tmp_path).sources)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_link_or_device_is_left_out(tmp_path: Path, kind: bytes) -> None:
    archive = write_tar(tmp_path / "a.tar", {"a.pdf": b""}, type=kind, linkname="/etc/passwd")
    assert read_all(archive) == {"a.pdf": "unsafe_member"}


def test_a_link_in_a_zip_archive_is_left_out(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a.pdf")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert read_all(tmp_path / "a.zip") == {"a.pdf": "unsafe_member"}


def test_folders_and_metadata_files_of_macos_are_not_documents(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"folder.pdf/": b"", "__MACOSX/._a.pdf": b"x", "./a.pdf": b"sea"})
    assert read_all(archive) == {"a.pdf": b"sea"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("folder.pdf")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert list_members(tmp_path / "a.tar") == ([], 0)


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_the_last_of_two_members_with_one_name_counts(tmp_path: Path, write: Any, name: str) -> None:
    archive = write(tmp_path / name, {"a.pdf": b"sea"})
    if name == "a.zip":
        with zipfile.ZipFile(archive, "a") as more, pytest.warns(UserWarning, match="Duplicate name"):
            more.writestr("a.pdf", b"ice")
    else:
        with tarfile.open(archive, "a") as more:
            info = tarfile.TarInfo("a.pdf")
            info.size = 3
            more.addfile(info, io.BytesIO(b"ice"))
    assert read_all(archive) == {"a.pdf": b"ice"}


def test_an_encrypted_member_is_left_out(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a.pdf": b"sea", "b.pdf": b"ice"})
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # flag of the first local header
    content[content.index(b"PK\1\2") + 8] |= 1  # and of its entry in the directory
    archive.write_bytes(content)
    assert read_all(archive) == {"a.pdf": "encrypted", "b.pdf": b"ice"}


def test_a_compression_bomb_is_left_out(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"bomb.pdf": bytes(300 * 2**20), "a.pdf": b"sea"})
    assert archive.stat().st_size < 2 * 2**20
    assert read_all(archive) == {"a.pdf": b"sea", "bomb.pdf": "too_large"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_needs_much_memory_is_left_out(tmp_path: Path, compression: int) -> None:
    assert read_all(write_zip(tmp_path / "a.zip", {"a.pdf": b"sea"}, compression)) == {"a.pdf": "unsafe_member"}


def test_a_member_larger_than_any_document_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 100)
    for archive in (
        write_zip(tmp_path / "a.zip", {"a.pdf": bytes(101)}),
        write_tar(tmp_path / "a.tar", {"a.pdf": bytes(101)}),
    ):
        assert read_all(archive) == {"a.pdf": "too_large"}


def test_a_bomb_with_a_false_size_is_stopped_at_that_size(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a.pdf": bytes(3 * 2**20)})
    content = bytearray(archive.read_bytes())
    directory = content.index(b"PK\1\2")
    struct.pack_into("<L", content, directory + 24, 1000)
    archive.write_bytes(content)
    [member] = list_members(archive)[0]
    pieces: list[bytes] = []
    with archive.open("rb") as stream, pytest.raises(DamagedMember):
        pieces.extend(read_member(stream, member))
    assert sum(map(len, pieces)) <= 1000


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """A zip bomb can have one block of data for thousands of members."""
    archive = write_zip(tmp_path / "a.zip", {"a.pdf": os.urandom(5000)})
    content = archive.read_bytes()
    start = content.index(b"PK\1\2")
    end = content.index(b"PK\5\6")
    entry = content[start:end]
    entries = b"".join(entry.replace(b"a.pdf", b"%d.pdf" % n) for n in range(10))
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 10, 10, len(entries), start, 0)
    archive.write_bytes(content[:start] + entries + tail)
    with pytest.raises(InputError, match="its members overlap"):
        list_members(archive)


def test_a_wrong_checksum_is_damage(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a.pdf": b"sea level"}, zipfile.ZIP_STORED)
    archive.write_bytes(archive.read_bytes().replace(b"sea level", b"sea lever"))
    assert read_all(archive) == {"a.pdf": "damaged"}
    [source] = list_corpus(tmp_path).sources
    assert hash_source(tmp_path, source) == "damaged"
    [document] = extract_all(tmp_path, tmp_path / "cache")
    assert (document.id, document.reason, document.sha256, document.text) == ("a.zip/a.pdf", "damaged", "", "")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4" + bytes(100)])
@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is a damaged archive") as caught:
        list_corpus(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_archive_is_refused(tmp_path: Path, write: Any, name: str, share: float) -> None:
    archive = write(tmp_path / name, {f"{n}.pdf": os.urandom(3000) for n in range(5)})
    content = archive.read_bytes().rstrip(b"\0")
    archive.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="damaged archive"):
        list_members(archive)


def test_a_damaged_header_in_the_middle_of_a_tar_archive_is_refused(tmp_path: Path) -> None:
    """tarfile alone would end its list there without an error."""
    archive = write_tar(tmp_path / "a.tar", {f"{n}.pdf": b"sea" for n in range(3)})
    content = bytearray(archive.read_bytes())
    content[1024 + 10] ^= 1
    archive.write_bytes(content)
    with pytest.raises(InputError, match="its end is missing"):
        list_members(archive)


def test_a_tar_archive_after_the_end_of_another_is_refused(tmp_path: Path) -> None:
    """cat a.tar b.tar: a reader ends at the end of the first one."""
    first, second = (write_tar(tmp_path / f"{name}.tar", {f"{name}.pdf": b"sea"}) for name in "ab")
    (tmp_path / "all.tar").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(InputError, match="data follows its end"):
        list_members(tmp_path / "all.tar")


def test_a_sparse_member_of_a_tar_archive_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"sea")
    with (tmp_path / "sparse.pdf").open("wb") as file:
        file.truncate(2**24)
    names = ["-C", str(tmp_path), "a.pdf", "sparse.pdf"]
    subprocess.run(["tar", "-c", "-S", "-f", str(tmp_path / "all.tar"), *names], check=True)
    members, _ = list_members(tmp_path / "all.tar")
    assert [(member.name, member.reason) for member in members] == [("a.pdf", None), ("sparse.pdf", "unsafe_member")]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("num_bytes", [2**33, 2**60, 2**70])
def test_a_tar_header_with_an_impossible_size_is_refused(tmp_path: Path, kind: bytes, num_bytes: int) -> None:
    info = tarfile.TarInfo("a.pdf")
    info.type, info.size = kind, num_bytes
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match=r"a\.tar is a damaged archive \(\w"):
        list_members(tmp_path / "a.tar")


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a.pdf": b"sea"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\1\2") + 46] = 0  # zipfile cuts a name at its first zero byte
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged archive \(a file has no name\)"):
        list_members(archive)


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_mutated_archives(tmp_path: Path, write: Any, name: str) -> None:
    """Each archive is refused in one line, or each of its members is read or left out."""
    original = write(tmp_path / name, {f"{n}.pdf": prose(n).encode() * 9 for n in range(6)}).read_bytes()
    outcomes: set[Any] = set()
    for seed in range(400):
        rng = random.Random(seed)
        content = bytearray(original)
        for _ in range(rng.choice([1, 2, 8])):
            start = rng.randrange(len(content))
            content[start : start + rng.choice([1, 4])] = rng.choice([rng.randbytes(4), b"\xff" * 4, b"\0" * 4])
        (tmp_path / name).write_bytes(content)
        try:
            outcomes |= {type(value) for value in read_all(tmp_path / name).values()}
        except InputError as error:
            outcomes.add(len(str(error).splitlines()))
    assert {bytes, 1} <= outcomes <= {bytes, 1, Reason, str}


def test_a_changed_archive_is_noticed(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.pdf": zlib.compress(b"sea")})
    [source] = list_corpus(tmp_path).sources
    write_zip(tmp_path / "a.zip", {"other name.pdf": b"ice"})
    assert hash_source(tmp_path, source) == "damaged"
