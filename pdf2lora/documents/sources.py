"""The PDFs of a corpus: files of its folder, and members of archives in it."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, cast

from pdf2lora.documents.archives import (
    ARCHIVES,
    OTHER_ARCHIVES,
    DamagedMember,
    Member,
    is_apple_double,
    list_members,
    read_member,
)
from pdf2lora.documents.records import Reason
from pdf2lora.errors import InputError
from pdf2lora.runtime.files import file_sha256, is_lfs_pointer

MAX_POINTER_BYTES = 1024  # a Git LFS pointer has about 130
MAX_SUFFIXES = 3  # of files that are not PDFs, in a message


@dataclass(frozen=True)
class Source:
    """A PDF file, or a member of an archive."""

    path: Path  # of the file or of the archive, in the corpus folder
    member: Member | None = None

    @property
    def id(self) -> str:
        # The name of a member can start with /, and then self.path / name would lose self.path.
        path = self.path if self.member is None else Path(f"{self.path}/{self.member.name}")
        return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Listing:
    """The content of a corpus folder."""

    sources: list[Source]
    unread: list[str]  # one sentence for each file or folder that may have documents but is not read


def list_corpus(folder: Path) -> Listing:
    """Lists all PDFs of a corpus, sorted by path. Sub-folders are included, linked folders are not.

    Raises InputError if an archive is damaged.
    """
    sources: list[Source] = []
    unread: list[str] = []
    other_suffixes: Counter[str] = Counter()
    num_pointers = 0
    for file in sorted(folder.rglob("*")):
        suffix = file.suffix.lower()
        if is_apple_double(file.name):
            continue
        if file.is_symlink() and file.is_dir():
            unread.append(f"the linked folder {file} is not read, because DVC does not track its files. Copy them.")
        elif suffix in OTHER_ARCHIVES and file.is_file():
            unread.append(f"{file} is not read, because it has no random access. Make a .zip or .tar archive.")
        elif suffix in (".pdf", *ARCHIVES) and file.is_file():
            path = file.relative_to(folder)
            if file.stat().st_size < MAX_POINTER_BYTES and is_lfs_pointer(file):
                num_pointers += 1
                continue
            if suffix == ".pdf":
                sources.append(Source(path))
                continue
            members, num_others = list_members(file)
            sources += [Source(path, member) for member in members]
            if num_others:
                unread.append(f"{num_others} files in {file} are not read, because they do not end in .pdf.")
        elif file.is_file() and suffix != ".dvc" and not file.name.startswith("."):  # dvc import-url writes .dvc files
            other_suffixes[suffix or file.name] += 1
    if num_pointers:
        unread.append(f"{num_pointers} files in {folder} are only Git LFS pointers. Run git lfs pull there.")
    if other_suffixes:
        names = ", ".join(name for name, _ in other_suffixes.most_common(MAX_SUFFIXES))
        unread.append(
            f"{other_suffixes.total()} other files in {folder} ({names}) are not read, because they do not end in .pdf."
        )
    return Listing(sources, unread)


def corpus_state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Returns size in bytes and time of change in nanoseconds of each PDF and archive."""
    state = {}
    for file in folder.rglob("*"):
        if file.suffix.lower() in (".pdf", *ARCHIVES):
            with suppress(OSError):  # the file is gone, or a link leads to no file
                status = file.stat()
                state[file] = (status.st_size, status.st_mtime_ns)
    return state


def changed(path: Path | str) -> InputError:
    """The error for a corpus that another program changes while extract reads it."""
    return InputError(f"{path} changed during the extraction. Run again when no program writes to it.")


def require_sources(folder: Path, listing: Listing) -> None:
    """Raises InputError if the corpus has no PDF."""
    if not listing.sources:
        remedy = "".join(f" {sentence[0].upper()}{sentence[1:]}" for sentence in listing.unread[:1])
        raise InputError(f"corpus: {folder} has no .pdf file. Put PDFs there or select another corpus.{remedy}")


def hash_source(folder: Path, source: Source) -> str | Reason:
    """Returns the SHA-256 of a PDF's bytes, or the reason why its archive member cannot be read."""
    if source.member is None:
        return file_sha256(folder / source.path)
    if source.member.reason is not None:
        return source.member.reason
    digest = sha256()
    try:
        with (folder / source.path).open("rb") as archive:
            for piece in read_member(archive, source.member):
                digest.update(piece)
    except DamagedMember:
        return Reason.DAMAGED
    return digest.hexdigest()


@contextmanager
def local_file(folder: str, source: Source) -> Iterator[Path]:
    """Yields a file with the bytes of a PDF. It is a temporary copy if the PDF is in an archive or on another machine.

    folder: the corpus folder, or its address for fsspec (s3://bucket/folder).

    Raises DamagedMember as read_member does.
    """
    is_remote = "://" in folder
    if source.member is None and not is_remote:
        yield Path(folder) / source.path
        return
    with NamedTemporaryFile(prefix="pdf2lora-", suffix=".pdf") as copy:
        with _open_remote(folder, source.path) if is_remote else (Path(folder) / source.path).open("rb") as stream:
            if source.member is None:
                while piece := stream.read(2**20):
                    copy.write(piece)
            else:
                copy.writelines(read_member(stream, source.member))
        copy.flush()
        yield Path(copy.name)


def _open_remote(folder: str, path: Path) -> BinaryIO:
    from fsspec.core import url_to_fs

    try:
        file_system, root = url_to_fs(folder)
        return cast(BinaryIO, file_system.open(f"{root}/{path.as_posix()}", "rb"))
    except FileNotFoundError:
        raise
    except Exception as error:  # a missing package, wrong credentials, no answer: each library has its own exceptions
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{folder}: {path} cannot be opened ({text}). Check address, packages and credentials."
        ) from error
