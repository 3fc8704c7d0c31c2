"""Text -> packed training sequences; text -> evaluation windows.

Uses numpy and tokenizers only, so that callers can count tokens without importing torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pdf2lora.errors import InputError

IGNORED = -100  # label of a position without loss (the default ignore_index of torch's cross_entropy)

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Encoder:
    """The tokenizer of a base model, without its special tokens, and the ids of those around a document."""

    tokenizer: Tokenizer
    bos: int | None
    """None: the authors of the model put no token before a document."""
    eos: int
    context_length: int

    @classmethod
    def load(cls, base: Path) -> "Encoder":
        """Reads tokenizer.json and config.json of a Hugging Face folder."""
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # "<|end_of_text|>" in a document is plain text
        eos = config["eos_token_id"]
        return cls(
            tokenizer=tokenizer,
            bos=config["bos_token_id"],
            eos=eos[0] if isinstance(eos, list) else eos,  # chat models also have an end-of-turn token
            context_length=config["max_position_embeddings"],
        )

    @property
    def start(self) -> int:
        """The token before the first one of a document. In training a document follows the end of another one."""
        return self.eos if self.bos is None else self.bos

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encoded]

    def sequences(self, texts: Sequence[str], *, seq_length: int) -> "Sequences":
        """Encodes and packs texts to training sequences (see pack)."""
        return pack(self.encode(texts), bos=self.bos, eos=self.eos, seq_length=seq_length)

    def windows(self, encoded: Sequence[Tokens], *, seq_length: int, stride: int) -> list["Window"]:
        """Evaluation windows of all documents (see windows). A window has the index of its document."""
        return [
            window
            for number, tokens in enumerate(encoded)
            for window in windows(number, tokens, bos=self.start, seq_length=seq_length, stride=stride)
        ]

    def require_context(self, num_tokens: int, key: str = "compute.seq_length") -> None:
        if num_tokens > self.context_length:
            raise InputError(
                f"{key} is {num_tokens}; the base model's context is {self.context_length} tokens. "
                f"Use a smaller value in params.yaml or with -S {key}=..."
            )


@dataclass(frozen=True)
class Sequences:
    """Training sequences: inputs and the next token at each position, both (num_sequences, seq_length), int64.

    A target IGNORED is not trained on.
    """

    inputs: Tokens
    targets: Tokens

    def __len__(self) -> int:
        return len(self.inputs)

    def num_targets(self, rows: Tokens) -> int:
        """The tokens that these sequences train on."""
        return int((self.targets[rows] != IGNORED).sum())


def pack(documents: Sequence[Tokens], *, bos: int | None, eos: int, seq_length: int) -> Sequences:
    """Cuts bos, document, eos, bos, document, eos, ... into sequences; each token but the first is a target once.

    The last sequence is padded with eos, without targets. As in the pretraining of Llama, a sequence can hold the end
    of one document and the start of the next.

    bos: None if the model has none; then only eos separates the documents.
    """
    start = [] if bos is None else [bos]
    stream = np.concatenate([np.concatenate([start, document, [eos]]).astype(np.int64) for document in documents])
    num_sequences = -(-(len(stream) - 1) // seq_length)
    inputs = np.full(num_sequences * seq_length, eos, dtype=np.int64)
    targets = np.full(num_sequences * seq_length, IGNORED, dtype=np.int64)
    inputs[: len(stream) - 1] = stream[:-1]
    targets[: len(stream) - 1] = stream[1:]
    return Sequences(inputs.reshape(num_sequences, seq_length), targets.reshape(num_sequences, seq_length))


@dataclass(frozen=True)
class Window:
    """A part of one document: the model's input, and the next tokens that this window scores.

    input_ids: (seq_length,) int64, padded on the right with bos. No scored position attends to padding.
    targets: (seq_length,) int64, the next token of each position, or IGNORED.
    """

    document: int
    input_ids: Tokens
    targets: Tokens


def windows(document: int, tokens: Tokens, *, bos: int, seq_length: int, stride: int) -> list[Window]:
    """Splits a document into overlapping windows that score each token exactly once.

    The first window scores seq_length tokens after bos. Each later one starts `stride` tokens further and scores only
    its new tokens. So each token has at least seq_length - stride tokens of context, or all tokens before it.
    """
    with_bos = np.concatenate([[bos], tokens])
    result = []
    num_scored = 0
    while num_scored < len(tokens):
        end = min(len(tokens), num_scored + stride if num_scored else seq_length)
        begin = max(0, end - seq_length)
        input_ids = np.full(seq_length, bos, dtype=np.int64)
        targets = np.full(seq_length, IGNORED, dtype=np.int64)
        input_ids[: end - begin] = with_bos[begin:end]
        targets[num_scored - begin : end - begin] = with_bos[num_scored + 1 : end + 1]
        result.append(Window(document, input_ids, targets))
        num_scored = end
    return result
