"""Llama 3's tokenizer.model, a tiktoken file: one line for each token with its bytes in base64 and its rank.

Sources: meta-llama/llama-models, models/llama3/tokenizer.py (split, special tokens); meta-llama/Llama-3.1-8B,
tokenizer.json (names since 3.1, BOS template); openai/tiktoken, src/lib.rs.
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from pdf2lora.errors import InputError
from pdf2lora.weights.bpe_merges import merges_of
from pdf2lora.weights.converted_tokenizer import ConvertedTokenizer, prepend_bos
from pdf2lora.weights.lfs_pointer import require_no_pointer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL_TOKENS = 256
LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")


def is_tiktoken(path: Path) -> bool:
    """Whether the first line is a token and a rank. Raises InputError if the file is a Git LFS pointer."""
    require_no_pointer(path)
    with path.open("rb") as file:
        return LINE.fullmatch(file.readline().rstrip(b"\r\n")) is not None


def convert_tiktoken(content: bytes, path: Path, llama_version: str) -> ConvertedTokenizer:
    """The content of a tiktoken file as the tokenizer of Llama "3" or later.

    path: of the file, for error messages.

    Raises InputError if a line is damaged or missing.
    """
    ranks = _parse_ranks(content, path)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    bpe = models.BPE(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=[(spell(left), spell(right)) for left, right in merges_of(ranks)],
        ignore_merges=True,  # as in tiktoken, a word that is a token needs no merges
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = llama3_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    special = llama3_special_tokens(llama_version)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos = special[:2]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), prepend_bos(bos, len(ranks))]
    )
    pad = special[-1] if llama_version == "3" else "<|finetune_right_pad_id|>"  # 3 has no token for padding
    return ConvertedTokenizer(tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=None)


def llama3_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits a text into words, and spells each word with the letters of its bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama3_special_tokens(llama_version: str) -> list[str]:
    """The 256 tokens after the last rank, in the order of their ids, for version "3" or a later one."""
    begin = ["<|begin_of_text|>", "<|end_of_text|>"]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    reserved = iter(f"<|reserved_special_token_{n}|>" for n in range(NUM_SPECIAL_TOKENS))
    if llama_version == "3":
        tokens = [*begin, *(next(reserved) for _ in range(4)), *header, next(reserved), "<|eot_id|>"]
    else:
        padding = [next(reserved), next(reserved), "<|finetune_right_pad_id|>", next(reserved)]
        tokens = [*begin, *padding, *header, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    return tokens + [next(reserved) for _ in range(NUM_SPECIAL_TOKENS - len(tokens))]


def byte_letters() -> list[str]:
    """The printable letter that ByteLevel uses for each byte (GPT-2, src/encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _parse_ranks(content: bytes, path: Path) -> Mapping[bytes, int]:
    """{token: rank}. The ranks are 0, 1, 2, ..., and every single byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        match = LINE.fullmatch(line)
        try:
            if match is None:
                raise ValueError
            token = base64.b64decode(match[1], validate=True)
        except ValueError:
            raise InputError(
                f"{path}: line {number} is {line[:40]!r}; it must be `base64 rank`. Download the file again."
            ) from None
        if token in ranks:
            raise InputError(f"{path}: line {number} repeats a token. Download the file again.")
        ranks[token] = int(match[2])
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: the ranks must be 0 to {len(ranks) - 1}, each once. Download the file again.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(
            f"{path}: the byte {missing[0]:#04x} has no rank, all 256 bytes must have one. Download the file again."
        )
    return ranks
