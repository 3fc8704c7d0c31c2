"""The reader of sentencepiece's protocol buffer against sentencepiece."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizer_texts import train_sentencepiece

from pdf2lora.weights.sentencepiece_proto import Algorithm, PieceType, parse_model


def test_pieces_equal_those_of_sentencepiece(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path, user_defined_symbols=["river"], vocab_size=440)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    pieces = parse_model(path.read_bytes()).pieces

    assert len(pieces) == processor.GetPieceSize()
    for number, piece in enumerate(pieces):
        assert piece.text == processor.IdToPiece(number)
        assert piece.score == pytest.approx(processor.GetScore(number))
        assert (piece.type == PieceType.CONTROL) == processor.IsControl(number)
        assert (piece.type == PieceType.UNKNOWN) == processor.IsUnknown(number)
        assert (piece.type == PieceType.BYTE) == processor.IsByte(number)
    assert [piece.text for piece in pieces if piece.type == PieceType.USER_DEFINED] == ["river"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"algorithm": Algorithm.BPE, "normalizer": "identity", "charsmap": b"", "byte_fallback": True}),
        ({"model_type": "unigram", "vocab_size": 350}, {"algorithm": Algorithm.UNIGRAM}),
        ({"add_dummy_prefix": False}, {"add_dummy_prefix": False, "remove_extra_whitespaces": False}),
        ({"remove_extra_whitespaces": True}, {"add_dummy_prefix": True, "remove_extra_whitespaces": True}),
        ({"treat_whitespace_as_suffix": True}, {"treat_whitespace_as_suffix": True}),
    ],
)
def test_settings_are_read(tmp_path: Path, options: dict[str, Any], expected: dict[str, Any]) -> None:
    model = parse_model(train_sentencepiece(tmp_path, **options).read_bytes())

    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize("length", [1, 100, 1000, 5000])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    content = train_sentencepiece(tmp_path).read_bytes()

    with pytest.raises((ValueError, KeyError)):
        parse_model(content[:length])
