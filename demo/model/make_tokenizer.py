"""Trains the demo's tokenizer: general text -> models/source/demo/tokenizer.model, in Llama 3's tiktoken format.

    python -m demo.model.make_tokenizer TEXT_FOLDER

The file has one line for each token: its bytes in base64, a space, its rank. Llama 3 appends its 256 special tokens
after the last rank, so 3,840 ranks make a vocabulary of 4,096.
"""

import base64
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, trainers

from demo.model.text import train_and_held_out
from pdf2lora.weights.tiktoken_files import byte_letters, llama3_pre_tokenizer

NUM_RANKS = 3840
TARGET = Path("models/source/demo/tokenizer.model")


def main() -> None:
    train, _ = train_and_held_out(Path(sys.argv[1]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = llama3_pre_tokenizer()
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    trainer = trainers.BpeTrainer(vocab_size=NUM_RANKS, initial_alphabet=list(byte_of), show_progress=False)
    tokenizer.train_from_iterator(train, trainer)

    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(byte_of[c] for c in token)).decode() + f" {rank}" for token, rank in ids]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("\n".join(lines) + "\n")
    print(f"{TARGET}: {len(lines)} ranks")


if __name__ == "__main__":
    main()
