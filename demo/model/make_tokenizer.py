"""general text -> models/source/demo/tokenizer.model, a byte-level BPE in Llama 3's tiktoken format.

    python -m demo.model.make_tokenizer TEXT_FOLDER

One line a token: its bytes in base64, a space, its rank. Special tokens are not in the file: Llama 3 appends its 256
after the last rank, so 3,840 ranks make a vocabulary of 4,096.
"""

import base64
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from demo.model.text import train_and_held_out

NUM_RANKS = 3840
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TARGET = Path("models/source/demo/tokenizer.model")


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that ByteLevel writes for each byte (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def main() -> None:
    train, _ = train_and_held_out(Path(sys.argv[1]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = byte_level_alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_RANKS, initial_alphabet=list(alphabet), show_progress=False)
    tokenizer.train_from_iterator(train, trainer)

    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(alphabet[c] for c in token)).decode() + f" {rank}" for token, rank in ids]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("\n".join(lines) + "\n")
    print(f"{TARGET}: {len(lines)} ranks")


if __name__ == "__main__":
    main()
