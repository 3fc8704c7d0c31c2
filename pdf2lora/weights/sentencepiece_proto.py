"""The parts of a sentencepiece model file that sentencepiece's Python package does not expose.

The file is a protocol buffer (google/sentencepiece, src/sentencepiece_model.proto; protobuf.dev, "Encoding"). Only a
few fields are needed, so this module reads them without protobuf.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """The defaults are those of the .proto file."""

    pieces: tuple[Piece, ...]
    algorithm: Algorithm = Algorithm.UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    normalizer: str = ""
    """Name of the rule, such as identity or nmt_nfkc."""
    charsmap: bytes = b""
    """The compiled rule; empty: no change."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def parse_model(content: bytes) -> SentencePieceModel:
    """Raises ValueError if the bytes are not a sentencepiece model."""
    pieces: list[Piece] = []
    settings: dict[str, object] = {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
            settings |= {"algorithm": Algorithm(int(trainer.get(3, Algorithm.UNIGRAM)))}
            settings |= {"treat_whitespace_as_suffix": bool(trainer.get(24, False))}
            settings |= {"byte_fallback": bool(trainer.get(35, False))}
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
            settings |= {
                "normalizer": _as_bytes(normalizer.get(1, b"")).decode(),
                "charsmap": _as_bytes(normalizer.get(2, b"")),
                "add_dummy_prefix": bool(normalizer.get(3, True)),
                "remove_extra_whitespaces": bool(normalizer.get(4, True)),
                "escape_whitespaces": bool(normalizer.get(5, True)),
            }
    return SentencePieceModel(tuple(pieces), **settings)  # type: ignore[arg-type]


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))
    return Piece(_as_bytes(fields[1]).decode(), score, PieceType(int(fields.get(3, PieceType.NORMAL))))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the fields of a message: (number, value). A varint is an int, any other value is bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire_type == BYTES:
            length, at = _varint(content, at)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if at + length > len(content):
            raise ValueError("truncated")
        yield number, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The varint at a position (7 bits in each byte), and the position after it."""
    value = shift = 0
    while True:
        if at >= len(content) or shift > 63:
            raise ValueError("truncated")
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes must be")
    return value
