"""Texts and trained vocabularies for the tests of tokenizers."""

import base64
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

KEY = "models.tiny.llama_version"
SENTENCEPIECE_VOCAB_SIZE = 430
TRAINING_TEXT = """It is raining on the hills, and the river doesn't rest: it'll rise by 1250 mm before the year 2040.
The sea is warmer than it was; the ice is thinner than it has been. They've measured it, we're told, since 1979.
Der Fluß läuft über; l'été a été très chaud; 海の温度が上がっている。
Where there is heat there is rain, and then again heat.
    for year in range(1979, 2041):
        print(year,  heat[year])
"""
TRICKY_TEXTS = [
    "",
    " ",
    "Hello, world",
    "the river, the rain, the heat",
    "don't DON'T it'll they've we're I'd 's 't",
    "1 12 123 1234 12345678 3.14 1,000,000",
    " one  two   three    four",
    "trailing  \n\n  leading\n\tTab \t \r\n end  ",
    "\n\n\n",
    "    indented(code[0])  # comment...!!!",
    "äöü ß naïve e\u0301 \u00a0 ﬁn \u2028 Ελλάδα Привет हिन्दी 한국어 海の温度",
    "🙂👩\u200d👩\u200d👧🏳️\u200d🌈 ☃",
    "▁▁ under▁score",
    "<|begin_of_text|> <s> </s> <unk> <0x0A> <|eot_id|>",
    "aaaaaaaaaaaaaaaa eeeeeee thththth",
    "a zyxw zyxwv zyxw.",
    "\x00\x01\x7f",
]


def train_ranks(text: str, num_merges: int) -> dict[bytes, int]:
    """Byte-level BPE: joins the most frequent neighbours `num_merges` times."""
    words = Counter(re.findall(r" ?\S+|\s+", text))
    spelled = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(num_merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for parts in spelled.values():
            for n in range(len(parts) - 1, 0, -1):
                if parts[n - 1 : n + 1] == [left, right]:
                    parts[n - 1 : n + 1] = [left + right]
    return ranks


def rank_lines(ranks: dict[bytes, int]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]


RANKS = train_ranks(TRAINING_TEXT, 200)
RANKS[b" zyxw"] = len(RANKS)  # no merges lead to it; Llama 3 has 588 such tokens, which match whole words only


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """A BPE model like Llama 2's; options: of the trainer."""
    text = folder / "text.txt"
    text.write_text(TRAINING_TEXT * 3, encoding="utf-8")
    llama: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": SENTENCEPIECE_VOCAB_SIZE,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(folder / "tokenizer"), minloglevel=2, num_threads=1, **(llama | options)
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def load_auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder)


def random_texts(seed: int, number: int) -> list[str]:
    """Words and fragments of the training text in a new order, so that the merges differ."""
    draw = random.Random(seed)
    pieces = re.findall(r"\w+|\s+|.", TRAINING_TEXT) + list("abehinrst 019\n")
    return ["".join(draw.choices(pieces, k=30)) for _ in range(number)]
