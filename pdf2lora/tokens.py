"""Text -> packed training sequences; text -> evaluation windows.

Numpy and `tokenizers` alone: whoever counts tokens need not import torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pdf2lora.errors import InputError

IGNORED = -100  # the label of a position that is not scored (torch's cross_entropy)

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
        tokenizer.encode_special_tokens = True  # "<|end_of_text|>" in a document is text, not the end of it
        eos = config["eos_token_id"]
        return cls(
            tokenizer=tokenizer,
            bos=config["bos_token_id"],
            eos=eos[0] if isinstance(eos, list) else eos,  # the chat models end turns too
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
        """The texts as rows to train on: see pack."""
        return pack(self.encode(texts), bos=self.bos, eos=self.eos, seq_length=seq_length)

    def windows(self, encoded: Sequence[Tokens], *, seq_length: int, stride: int) -> list["Window"]:
        """Windows that score each token of each document exactly once: see windows; documents by their numbers."""
        return [
            window
            for number, tokens in enumerate(encoded)
            for window in windows(number, tokens, bos=self.start, seq_length=seq_length, stride=stride)
        ]

    def require_context(self, num_tokens: int, key: str = "compute.seq_length") -> None:
        if num_tokens > self.context_length:
            raise InputError(
                f"{key}: {num_tokens} must not be greater than the context of the base model "
                f"({self.context_length} tokens); change it in params.yaml or with -S {key}=..."
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
    """A stretch of one document for the model to read, and which of its next tokens count.

    input_ids: (seq_length,), filled up with bos on the right, where it is seen by no token that counts;
    targets: (seq_length,), the next token at each position, or IGNORED.
    """

    document: int
    input_ids: Tokens
    targets: Tokens


def windows(document: int, tokens: Tokens, *, bos: int, seq_length: int, stride: int) -> list[Window]:
    """Windows that score each token of a document exactly once.

    The first one scores seq_length tokens, each later one moves on by `stride` and scores what is new in it, so that
    a token has at least seq_length - stride tokens before it, where the document has them (bos stands before the
    first).
    """
    with_bos = np.concatenate([[bos], tokens])
    made = []
    scored = 0
    while scored < len(tokens):
        end = min(len(tokens), scored + stride if scored else seq_length)
        begin = max(0, end - seq_length)
        input_ids = np.full(seq_length, bos, dtype=np.int64)
        targets = np.full(seq_length, IGNORED, dtype=np.int64)
        input_ids[: end - begin] = with_bos[begin:end]
        targets[scored - begin : end - begin] = with_bos[scored + 1 : end + 1]
        made.append(Window(document, input_ids, targets))
        scored = end
    return made
