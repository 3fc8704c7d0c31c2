"""Meta's tokenizer.model -> tokenizer.json and tokenizer_config.json, written with the `tokenizers` library alone.

Llama 1 and 2 ship a sentencepiece BPE model, Llama 3 and later a tiktoken file: a token a line, base64 bytes and rank.
Both name the tokens and their order but not the pairs that were merged; `last_merge` recovers the pairs.
Sources: meta-llama/llama-models, models/llama3/tokenizer.py (split, special tokens); meta-llama/Llama-3.1-8B,
tokenizer.json (names since 3.1, BOS template); openai/tiktoken, src/lib.rs; google/sentencepiece, src/bpe_model.cc.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import AnyStr

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdf2lora.errors import InputError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_LLAMA3_SPECIAL_TOKENS = 256
_SENTENCEPIECE_VERSIONS = ("1", "2")
_TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")
_SPACE = "▁"  # U+2581, sentencepiece's visible space
# Normalizers other than Llama's would change some of this.
_PROBE_TEXT = " two  spaces \n\n\ttab, don't, 1234567 µ ﬁ é e\u0301 中文 🙂👩\u200d👩\u200d👧 \u00a0 ▁ "


@dataclass(frozen=True)
class LlamaTokenizer:
    """A tokenizer in memory, with the names of its special tokens; `write` puts it into a folder."""

    tokenizer: Tokenizer
    bos_token: str
    eos_token: str
    pad_token: str
    unk_token: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included: the rows that the embedding must have."""
        return self.tokenizer.get_vocab_size()

    def token_ids(self) -> dict[str, int]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id`, as config.json wants them."""
        tokens = {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}
        ids = self.tokenizer.get_vocab()
        return {f"{name}_token_id": ids[token] for name, token in tokens.items()}

    def write(self, target: Path, *, context_length: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the folder `target`; context_length in tokens."""
        self.tokenizer.save(str(target / "tokenizer.json"))
        # transformers 5 rebuilds whatever calls itself LlamaTokenizer from its vocabulary; under this name it loads
        # tokenizer.json as it stands.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": context_length,
        }
        if self.unk_token is not None:
            config["unk_token"] = self.unk_token
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_tokenizer(path: Path, *, llama_version: str, key: str) -> LlamaTokenizer:
    """Reads a tokenizer.model as the tokenizer of `llama_version` ("1", "2": sentencepiece; later: tiktoken).

    `key` is the params key that holds the version; error messages name it.
    Raises InputError if the file is missing or damaged, or its kind is not the version's.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; put the tokenizer.model of the checkpoint there")
    content = path.read_bytes()
    is_tiktoken = _TIKTOKEN_LINE.fullmatch(content.split(b"\n", 1)[0].rstrip(b"\r")) is not None
    if is_tiktoken and llama_version in _SENTENCEPIECE_VERSIONS:
        raise InputError(
            f'{path}: a tiktoken file, which Llama 3 and later have, but {key} is "{llama_version}"; correct {key}'
        )
    if is_tiktoken:
        return _from_ranks(_parse_ranks(content, path), llama_version)
    if llama_version in _SENTENCEPIECE_VERSIONS:
        return _from_sentencepiece(content, path)
    raise InputError(
        f'{path}: not a tiktoken file (lines of base64 and rank), which {key} "{llama_version}" has; '
        f"correct {key} (Llama 1 and 2 have sentencepiece files) or fetch the file again"
    )


def llama3_special_tokens(llama_version: str) -> list[str]:
    """The 256 tokens that follow the last rank, in the order of their ids; version "3" or one of its successors."""
    begin = ["<|begin_of_text|>", "<|end_of_text|>"]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    reserved = iter(f"<|reserved_special_token_{n}|>" for n in range(NUM_LLAMA3_SPECIAL_TOKENS))
    if llama_version == "3":
        named = [*begin, *(next(reserved) for _ in range(4)), *header, next(reserved), "<|eot_id|>"]
    else:
        padding = [next(reserved), next(reserved), "<|finetune_right_pad_id|>", next(reserved)]
        named = [*begin, *padding, *header, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    return named + [next(reserved) for _ in range(NUM_LLAMA3_SPECIAL_TOKENS - len(named))]


def last_merge(token: AnyStr, ranks: Mapping[AnyStr, float]) -> tuple[AnyStr, AnyStr] | None:
    """The two parts that BPE joins last on its way from characters (or bytes) to `token`; None if it never gets there.

    BPE joins, again and again, the leftmost neighbours whose union has the lowest rank. Inside a longer text, as long
    as no union reaches over the edges of `token`, the same unions happen in the same order; so this pair is the only
    one that can ever make the token, and a table of these pairs says the same as the ranks.
    """
    parts = [token[n : n + 1] for n in range(len(token))]
    unions = [ranks.get(token[n : n + 2], math.inf) for n in range(len(token) - 1)]  # of parts n and n + 1
    while len(parts) > 2:
        lowest = min(unions)
        if lowest == math.inf:
            return None
        at = unions.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del unions[at]
        for n in range(max(at - 1, 0), min(at + 1, len(unions))):
            unions[n] = ranks.get(parts[n] + parts[n + 1], math.inf)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _parse_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """tiktoken lines -> {token bytes: rank}, the ranks being 0, 1, 2, ... and every single byte among the tokens."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        match = _TIKTOKEN_LINE.fullmatch(line)
        try:
            if match is None:
                raise ValueError
            token = base64.b64decode(match[1], validate=True)
        except (binascii.Error, ValueError):
            raise InputError(
                f"{path}: line {number} is not `base64 rank`: {line[:40]!r}; fetch the file again"
            ) from None
        if token in ranks:
            raise InputError(f"{path}: line {number} repeats a token; fetch the file again")
        ranks[token] = int(match[2])
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once; fetch the file again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(
            f"{path}: byte {missing[0]:#04x} has no rank, all 256 bytes must have one; fetch the file again"
        )
    return ranks


def _from_ranks(ranks: Mapping[bytes, int], llama_version: str) -> LlamaTokenizer:
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    pairs = [pair for token in by_rank if (pair := last_merge(token, ranks)) is not None]
    bpe = models.BPE(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=[(spell(left), spell(right)) for left, right in pairs],
        ignore_merges=True,  # as in tiktoken, a word that is a token needs no merges
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = llama3_special_tokens(llama_version)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos = special[:2]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begin_with(bos, len(ranks))]
    )
    pad = special[-1] if llama_version == "3" else "<|finetune_right_pad_id|>"  # 3 has no token for padding
    return LlamaTokenizer(tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=None)


def _from_sentencepiece(content: bytes, path: Path) -> LlamaTokenizer:
    try:
        import sentencepiece  # only Llama 1 and 2 need it
    except ImportError:
        raise InputError(
            f"{path}: reading a sentencepiece file needs a package that is missing; pip install sentencepiece"
        ) from None

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError):
        raise InputError(f"{path}: not a sentencepiece model; fetch the file again") from None

    size = processor.GetPieceSize()
    pieces = [processor.IdToPiece(n) for n in range(size)]
    special_ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    if absent := [name for name, n in special_ids.items() if n < 0]:
        raise InputError(f"{path}: the model has no {absent[0]} token, which Llama 1 and 2 have; fetch the file again")
    unk, bos, eos = (pieces[n] for n in special_ids.values())

    vocab = {piece: n for n, piece in enumerate(pieces)}
    kinds_apart = (processor.IsControl, processor.IsUnknown, processor.IsByte, processor.IsUnused)
    ranks = {piece: -processor.GetScore(n) for n, piece in enumerate(pieces) if not any(is_(n) for is_ in kinds_apart)}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    pairs = [pair for piece in by_rank if (pair := last_merge(piece, ranks)) is not None]
    merges = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _begin_with(bos, vocab[bos])

    # The file also names an algorithm, a normalizer and symbols that are cut out of the text beforehand. Llama has BPE,
    # none and none; that this file has the same shows in the ids of every piece and of the probe text.
    text = _PROBE_TEXT + "\n".join(pieces[n].replace(_SPACE, " ") for n in range(size) if pieces[n] in ranks)
    if tokenizer.encode(text, add_special_tokens=False).ids != processor.EncodeAsIds(text):
        raise InputError(
            f"{path}: a sentencepiece model unlike Llama's (BPE, no normalization, a space before the first word, "
            "no user-defined symbols); use the tokenizer.model that came with the checkpoint"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (unk, bos, eos)])
    return LlamaTokenizer(tokenizer, bos_token=bos, eos_token=eos, pad_token=unk, unk_token=unk)


def _begin_with(bos: str, bos_id: int) -> processors.TemplateProcessing:
    """Every text begins with BOS, in a pair each of the two, as in Meta's own Hugging Face checkpoints."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _byte_letters() -> list[str]:
    """The printable letter that ByteLevel puts in place of each byte (GPT-2, src/encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
