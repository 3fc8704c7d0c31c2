"""Text -> tokens; tokens -> training sequences and evaluation windows. Both are views, not copies, of the tokens.

Uses numpy and tokenizers only, so that callers need not import torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pdf2lora.params import require_in_context

UNLIKELY = -1e4  # score of a piece that a Unigram model never selects
IGNORED = -100  # label of a position without loss (the default ignore_index of torch's cross_entropy)

Tokens = NDArray[np.signedinteger[Any]]  # int32 in files, int64 in batches


@dataclass(frozen=True)
class Encoder:
    """The tokenizer of a base model without its special tokens, and the ids of bos and eos."""

    tokenizer: Tokenizer
    bos: int | None
    """None if the model was trained without a token before a document."""
    eos: int

    @classmethod
    def load(cls, base: Path) -> "Encoder":
        """Reads tokenizer.json and config.json of a Hugging Face folder."""
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        eos = config["eos_token_id"]
        return cls.from_json(
            (base / "tokenizer.json").read_text(encoding="utf-8"),
            config["bos_token_id"],
            eos[0] if isinstance(eos, list) else eos,  # chat models also have an end-of-turn token
        )

    @classmethod
    def from_json(cls, tokenizer_json: str, bos: int | None, eos: int) -> "Encoder":
        tokenizer = Tokenizer.from_str(_with_unlikely_special_pieces(tokenizer_json))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "<|end_of_text|>" in a document is plain text
        return cls(tokenizer, bos, eos)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the encoder for another machine. A pickled Tokenizer would lose encode_special_tokens."""
        return Encoder.from_json, (self.tokenizer.to_str(), self.bos, self.eos)

    @property
    def start(self) -> int:
        """The token before a document: bos, or without bos eos, because in training a document follows another one."""
        return self.eos if self.bos is None else self.bos

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, encoded on all cores."""
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encoded]


def _with_unlikely_special_pieces(tokenizer_json: str) -> str:
    """Lowers the scores of the special tokens in the vocabulary of a Unigram model, so that <s> in a text stays text.

    encode_special_tokens only turns off the search for added tokens.
    """
    if '"Unigram"' not in tokenizer_json:
        return tokenizer_json
    content = json.loads(tokenizer_json)
    model = content["model"]
    if model.get("type") == "Unigram":
        special = {token["content"] for token in content["added_tokens"] if token["special"]}
        for number, entry in enumerate(model["vocab"]):
            if entry[0] in special and number != model.get("unk_id"):
                entry[1] = UNLIKELY
    return json.dumps(content, ensure_ascii=False)


def require_context(base: Path, num_tokens: Mapping[str, int]) -> None:
    """Raises InputError if the base model cannot read so many tokens: see require_in_context."""
    context_length = json.loads((base / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    require_in_context(context_length, num_tokens)


@dataclass(frozen=True)
class Sequences:
    """Training sequences: a stream of documents, cut every seq_length tokens. Every token but the first is a target.

    stream: bos, document, eos, bos, document, eos, ...; without bos if the model has none. The last sequence is padded
    with eos, without targets. As in the pretraining of Llama, a sequence can hold the end of one document and the start
    of the next.
    """

    stream: Tokens
    seq_length: int

    def __len__(self) -> int:
        return max(0, -(-(len(self.stream) - 1) // self.seq_length))  # an empty stream has none

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        """Inputs and the next token at each position, both (len(indices), seq_length), int64; IGNORED at the end."""
        places = indices[:, np.newaxis] * self.seq_length + np.arange(self.seq_length + 1)
        last = len(self.stream) - 1  # eos
        tokens = self.stream[np.minimum(places, last)].astype(np.int64)
        return tokens[:, :-1].copy(), np.where(places[:, 1:] > last, IGNORED, tokens[:, 1:])

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Number of tokens that these sequences train on."""
        return int(np.minimum(self.seq_length, len(self.stream) - 1 - indices * self.seq_length).sum())


@dataclass(frozen=True)
class MixedSequences:
    """The sequences of the corpus, then those of the replay text, as one set."""

    corpus: Sequences
    replay: Sequences

    def __len__(self) -> int:
        return len(self.corpus) + len(self.replay)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        """See Sequences.batch."""
        is_replay = indices >= len(self.corpus)
        inputs, targets = self.corpus.batch(np.where(is_replay, 0, indices))
        inputs[is_replay], targets[is_replay] = self.replay.batch(indices[is_replay] - len(self.corpus))
        return inputs, targets

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Number of tokens that these sequences train on."""
        return self.corpus.num_targets(indices[indices < len(self.corpus)]) + self.num_replay_targets(indices)

    def num_replay_targets(self, indices: NDArray[np.int64]) -> int:
        return self.replay.num_targets(indices[indices >= len(self.corpus)] - len(self.corpus))


@dataclass(frozen=True, slots=True)
class Window:
    """A part of one document: the model's input and the tokens that this window scores.

    document: number of the document. tokens: all its tokens. bos: the token before them.
    begin, end: the input is the part [begin, end) of bos and the document's tokens.
    num_scored: number of the document's tokens that earlier windows score.
    """

    document: int
    tokens: Tokens
    bos: int
    begin: int
    num_scored: int
    end: int
    seq_length: int

    @property
    def input_ids(self) -> Tokens:
        """(seq_length,), int64, padded on the right with bos. No scored position attends to padding."""
        input_ids = np.full(self.seq_length, self.bos, dtype=np.int64)
        first = max(self.begin, 1)
        input_ids[first - self.begin : self.end - self.begin] = self.tokens[first - 1 : self.end - 1]
        return input_ids

    @property
    def targets(self) -> Tokens:
        """(seq_length,), int64, the next token at each position that this window scores, else IGNORED."""
        targets = np.full(self.seq_length, IGNORED, dtype=np.int64)
        targets[self.num_scored - self.begin : self.end - self.begin] = self.tokens[self.num_scored : self.end]
        return targets

    @property
    def num_targets(self) -> int:
        return self.end - self.num_scored


def windows(documents: Iterable[Tokens], *, bos: int, seq_length: int, stride: int) -> list[Window]:
    """Splits documents into overlapping windows that score each token exactly once.

    The first window of a document scores seq_length tokens after bos. Each later window starts `stride` tokens further
    and scores only its new tokens. So each token has at least seq_length - stride tokens of context, or all before it.
    """
    result = []
    for document, tokens in enumerate(documents):
        num_scored = 0
        while num_scored < len(tokens):
            end = min(len(tokens), num_scored + stride if num_scored else seq_length)
            result.append(Window(document, tokens, bos, max(0, end - seq_length), num_scored, end, seq_length))
            num_scored = end
    return result
