"""PDFs in .zip and .tar archives, read in place: nothing is unpacked, and the path of a member is never opened.

An archive can be hostile. A member that is a link, has a path out of the archive, is too large or is a compression bomb
is left out with a reason. A damaged archive is refused, because the number of its documents is unknown.
"""

import errno
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pdf2lora.documents.records import Reason
from pdf2lora.errors import InputError

ARCHIVES = (".zip", ".tar")
OTHER_ARCHIVES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")
MAX_MEMBER_BYTES = 2**30
FREE_BYTES = 2**20  # a member may have so many bytes, whatever its packed size,
MAX_RATIO = 200  # plus 200 for each packed byte; a larger one is a compression bomb
CHUNK_BYTES = 2**20

_ZIP_HEADER = struct.Struct("<4s22xHH")
_IS_ENCRYPTED = 0x1
_FILE_TYPE, _LINK = 0o170000, 0o120000
_FAULTS = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error),
    *(EOFError, LookupError, MemoryError, NotImplementedError, OverflowError, ValueError),
)


class DamagedMember(Exception):
    """A member does not have the size or the checksum that the archive promises."""


@dataclass(frozen=True)
class Member:
    """A PDF in an archive, and the position of its data."""

    name: str  # path in the archive
    offset: int
    packed_bytes: int
    num_bytes: int
    compression: int | None = None  # zipfile's number; None in a .tar archive
    crc32: int | None = None
    reason: Reason | None = None  # why it is not read


def list_members(archive: Path) -> tuple[list[Member], int]:
    """Returns the PDFs of an archive, sorted by name, and the number of its other files.

    If several members have the same name, the last one is used, as in an unpacked archive.

    Raises InputError if the archive is damaged.
    """
    try:
        with archive.open("rb") as stream:
            members = list(_zip_members(stream) if archive.suffix.lower() == ".zip" else _tar_members(stream))
    except (*_FAULTS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a header has a negative position
            raise
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{archive} is a damaged archive ({text}). Make it again, or remove it.") from error
    by_name = {member.name: member for member in members if not is_apple_double(member.name)}
    pdfs = [by_name[name] for name in sorted(by_name) if name.lower().endswith(".pdf")]
    return pdfs, len(by_name) - len(pdfs)


def is_apple_double(name: str) -> bool:
    """True if a file has the metadata of another one. macOS writes ._report.pdf next to report.pdf, or in __MACOSX."""
    return PurePosixPath(name).name.startswith("._")


def _zip_members(stream: BinaryIO) -> Iterator[Member]:
    packed_bytes = 0
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if not info.filename:
                raise ValueError("a file has no name")
            if info.is_dir():
                continue
            stream.seek(info.header_offset)
            signature, name_bytes, extra_bytes = _ZIP_HEADER.unpack(stream.read(_ZIP_HEADER.size))
            if signature != b"PK\x03\x04":
                raise ValueError(f"no header for {info.filename!r}")
            offset = info.header_offset + _ZIP_HEADER.size + name_bytes + extra_bytes
            packed_bytes += info.compress_size
            if info.flag_bits & _IS_ENCRYPTED:
                reason: Reason | None = Reason.ENCRYPTED
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others can need much memory
                reason = Reason.UNSAFE_MEMBER
            else:
                is_link = info.external_attr >> 16 & _FILE_TYPE == _LINK
                reason = _fault(info.filename, info.file_size, info.compress_size, is_file=not is_link)
            name = str(PurePosixPath(info.filename))
            yield Member(
                name, offset, info.compress_size, info.file_size, info.compress_type, crc32=info.CRC, reason=reason
            )
        if packed_bytes > stream.seek(0, 2):
            raise ValueError("its members overlap")


def _tar_members(stream: BinaryIO) -> Iterator[Member]:
    num_bytes = stream.seek(0, 2)
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for info in archive:
            if info.isdir():
                continue
            if info.isreg() and not info.issparse() and info.offset_data + info.size > num_bytes:
                raise ValueError(f"it ends in {info.name!r}")
            reason = _fault(info.name, info.size, info.size, is_file=info.isreg() and not info.issparse())
            yield Member(str(PurePosixPath(info.name)), info.offset_data, info.size, info.size, reason=reason)
        stream.seek(archive.offset)  # tarfile ends at an invalid header without an error
        if len(end := stream.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or any(end):
            raise ValueError("its end is missing")
        while padding := stream.read(CHUNK_BYTES):
            if padding.strip(b"\0"):
                raise ValueError("data follows its end")


def _fault(name: str, num_bytes: int, packed_bytes: int, *, is_file: bool) -> Reason | None:
    parts = name.replace("\\", "/").split("/")
    if not is_file or ".." in parts or not parts[0] or parts[0].endswith(":"):
        return Reason.UNSAFE_MEMBER
    is_bomb = num_bytes > FREE_BYTES + MAX_RATIO * packed_bytes
    return Reason.TOO_LARGE if num_bytes > MAX_MEMBER_BYTES or is_bomb else None


def read_member(archive: BinaryIO, member: Member) -> Iterator[bytes]:
    """Yields the content of a member in pieces of at most CHUNK_BYTES.

    Raises DamagedMember if the size or the checksum is wrong.
    """
    info = zipfile.ZipInfo()
    info.compress_type, info.compress_size = member.compression or zipfile.ZIP_STORED, member.packed_bytes
    info.file_size = member.num_bytes
    if member.crc32 is not None:
        info.CRC = member.crc32
    num_read = 0
    try:
        archive.seek(member.offset)
        content = zipfile.ZipExtFile(archive, "r", info)  # never returns more than file_size bytes
        while piece := content.read(CHUNK_BYTES):
            num_read += len(piece)
            yield piece
    except _FAULTS as error:
        raise DamagedMember(str(error)) from error
    if num_read != member.num_bytes:
        raise DamagedMember("the archive is too short")
