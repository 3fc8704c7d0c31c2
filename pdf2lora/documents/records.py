"""The records of the document stages and their JSONL files."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

SPLITS = ("train", "validation", "test")
COMPLETE = "complete"


class Reason(StrEnum):
    """Why a document is left out."""

    ENCRYPTED = "encrypted"
    DAMAGED = "damaged"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"  # the worker process died: a fault of the engine, or of the machine
    NO_TEXT_LAYER = "no_text_layer"
    UNREADABLE_FONT = "unreadable_font"
    PLACEHOLDER = "placeholder"  # an XFA form: the page only asks for another viewer
    TOO_LARGE = "too_large"  # a member of an archive: more than 1 GiB, or a compression bomb
    UNSAFE_MEMBER = "unsafe_member"  # of an archive: a link, a path out of the archive, or an unusual compression
    ONLY_ATTACHMENTS = "only_attachments"  # the documents are attached to a cover page (PDF portfolio)
    TOO_SHORT = "too_short"
    DUPLICATE = "duplicate"


@dataclass
class Attempt:
    """The pages that one engine read from one document."""

    engine: str
    outcome: str = COMPLETE  # or the Reason that stopped the engine
    num_pages: int | None = None
    pages: list[str] = field(default_factory=list)
    is_sample: bool = False  # some pages were not read and are empty here
    pages_reordered: int = 0
    is_placeholder: bool = False
    num_attachments: int = 0


@dataclass(frozen=True)
class Extraction:
    """The text of one PDF, or the reason why there is none."""

    num_pages: int | None = None
    pages_read: int = 0
    engine: str | None = None
    attempts: dict[str, str] = field(default_factory=dict)
    characters_raw: int = 0
    text: str = ""
    reason: str | None = None
    pages_ocr: int = 0
    pages_reordered: int = 0
    pages_unreadable: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    language: str | None = None


@dataclass(frozen=True)
class Document:
    """One PDF of the corpus, kept or left out."""

    id: str  # path in the corpus folder; of an archive's member: path of the archive, then path in it
    sha256: str  # of the PDF's bytes; "" for a member that cannot be read
    num_pages: int | None = None  # of the file; None if no engine could count them
    pages_read: int = 0
    engine: str | None = None  # that read the text
    attempts: dict[str, str] = field(default_factory=dict)  # engine -> "complete" or the reason that stopped it
    characters_raw: int = 0  # before cleaning
    characters: int = 0  # of text
    reason: str | None = None  # why it is left out; None = kept
    text: str = ""
    pages_ocr: int = 0  # read by OCR
    pages_reordered: int = 0  # two columns that are drawn row by row, put in reading order
    pages_unreadable: int = 0  # left out, because their font has no Unicode map
    removed: dict[str, int] = field(default_factory=dict)  # by cleaning: kind -> count
    language: str | None = None  # code of ISO 639-1; None: no text


def write_through(file: Path, documents: Iterable[Document]) -> Iterator[Document]:
    """Writes one JSON object per line, in UTF-8. Yields each document after it is written."""
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for document in documents:
            out.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            yield document


def read_documents(file: Path) -> Iterator[Document]:
    """Reads one document at a time."""
    return (document for _, document in read_with_offsets(file))


def read_with_offsets(file: Path) -> Iterator[tuple[int, Document]]:
    """Reads one document at a time, with the place of its line in the file."""
    with file.open("rb") as lines:
        offset = 0
        for line in lines:
            yield offset, Document(**json.loads(line))
            offset += len(line)


def copy_documents(file: Path, offsets: Iterable[int], target: Path) -> None:
    """Copies the lines at these places."""
    with file.open("rb") as source, target.open("wb") as out:
        for offset in offsets:
            source.seek(offset)
            out.write(source.readline())
