"""data/tokens: the token ids of each split. The files are memory-mapped, so no stage holds all tokens in memory.

<split>.npy            (num_tokens,) int32: bos, document, eos, bos, document, eos, ...; no bos if the model has none
<split>_documents.npy  (num_documents, 2) int64: begin and end of each document's tokens in this array
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pdf2lora.runtime.parallel import batches
from pdf2lora.tokens import Encoder, Sequences, Tokens, Window, windows

MAX_BATCH_CHARACTERS = 4_000_000  # of texts that are encoded together

EncodeBatches = Callable[[Callable[[list[str]], list[Tokens]], Iterable[list[str]]], Iterator[list[Tokens]]]


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split. The arrays are memory-mapped: only the parts in use are in memory."""

    stream: Tokens
    bounds: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, split: str) -> "TokenFile":
        stream, bounds = (_map(file) for file in _files(folder, split))
        return cls(stream, bounds)

    def sequences(self, seq_length: int) -> Sequences:
        return Sequences(self.stream, seq_length)

    def documents(self) -> Iterator[Tokens]:
        """The tokens of each document, without bos and eos."""
        return (self.stream[begin:end] for begin, end in self.bounds.tolist())

    def windows(self, *, seq_length: int, stride: int) -> list[Window]:
        """Evaluation windows of all documents. If the model has no bos, they start with the previous document's eos."""
        if not len(self.bounds):
            return []
        first = self.bounds[0, 0]
        start = self.stream[first - 1]  # bos; without bos, first is 0, and stream[-1] is eos
        return windows(self.documents(), bos=int(start), seq_length=seq_length, stride=stride)


def encode_texts(encoder: Encoder, texts: Iterable[str], run: EncodeBatches = map) -> Iterator[Tokens]:
    """Yields the int32 tokens of each text. Reads one batch of texts at a time.

    run: like `map`, for a function and batches of texts; it can compute on other machines.
    """
    for batch in run(partial(_encode_batch, encoder), batches(texts, MAX_BATCH_CHARACTERS)):
        yield from batch


def _encode_batch(encoder: Encoder, texts: Sequence[str]) -> list[Tokens]:
    return [tokens.astype("<i4") for tokens in encoder.encode(texts)]


def write_tokens(folder: Path, split: str, documents: Iterable[Tokens], encoder: Encoder) -> dict[str, int]:
    """Writes the files of one split. Its memory does not grow with the number of tokens.

    documents: the int32 tokens of each document.

    Returns the numbers of documents and tokens, without bos and eos.
    """
    tokens_file, documents_file = _files(folder, split)
    before = np.array([] if encoder.bos is None else [encoder.bos], dtype="<i4")
    after = np.array([encoder.eos], dtype="<i4")
    bounds, length = [], 0
    with tokens_file.open("wb") as out:
        _write_header(out, 0)
        for tokens in documents:
            begin = length + len(before)
            bounds.append((begin, begin + len(tokens)))
            length = begin + len(tokens) + len(after)
            out.write(np.concatenate([before, tokens, after]).tobytes())
        out.seek(0)
        _write_header(out, length)
    np.save(documents_file, np.array(bounds, dtype="<i8").reshape(-1, 2))
    return {"documents": len(bounds), "tokens": sum(end - begin for begin, end in bounds)}


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.npy", folder / f"{split}_documents.npy"


def _map(file: Path) -> NDArray[Any]:
    return np.asarray(np.load(file, mmap_mode="r"))  # an array without the slow slices of numpy.memmap


def _write_header(out: IO[bytes], length: int) -> None:
    """The header of a .npy file. numpy leaves room in it, so that the length can change later."""
    np.lib.format.write_array_header_1_0(out, {"descr": "<i4", "fortran_order": False, "shape": (length,)})
