"""Text of another kind that train mixes into the corpus, so that the adapted model forgets less (train.replay)."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import InputError
from pdf2lora.runtime.parallel import Workers
from pdf2lora.split.leakage import NGRAM_WORDS, leakage

MAX_CHARACTERS = 10_000_000  # of a document: it is tokenized as a whole, in about 120 bytes per character
MAX_LEAKAGE = 0.01  # share of 13-word sequences; common phrases give less


def read_replay(folder: Path) -> Iterator[str]:
    """Yields the documents of the folder, in the order of the files' names.

    A .txt file is one document in UTF-8; a byte order mark is not part of its text. A .jsonl file has the format of
    data/documents.jsonl and data/split.

    Raises InputError if the folder has no text, a file is in another encoding or format, or a document is too long.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".txt", ".jsonl") and file.is_file())
    if not files:
        raise InputError(f"train.replay: {folder} has no text. Put .txt files there, or data/documents.jsonl of PDFs.")
    for file in files:
        try:
            for text in _texts_of(file):
                if len(text) > MAX_CHARACTERS:
                    raise InputError(
                        f"train.replay: {file} has a document of {len(text):,} characters; at most {MAX_CHARACTERS:,} "
                        "are allowed. Divide it into several files, for example with split -C 10M."
                    )
                text.encode()  # fails for a half surrogate pair, which JSON can have
                yield text
        except UnicodeDecodeError as error:
            raise InputError(f"train.replay: {file} is not UTF-8 ({error}). Convert it with iconv -t UTF-8.") from None
        except (json.JSONDecodeError, TypeError, AttributeError, UnicodeEncodeError) as error:
            raise InputError(
                f"train.replay: a line of {file} has not the format of data/documents.jsonl ({error}). Put its texts "
                "into .txt files."
            ) from None


def _texts_of(file: Path) -> Iterator[str]:
    if file.suffix.lower() == ".txt":
        yield file.read_text(encoding="utf-8-sig")
    else:
        for document in read_documents(file):
            if document.reason is None:
                yield document.text


def require_unseen(replay: Iterable[str], scored: Iterable[str], name: str, folder: Path, workers: Workers) -> None:
    """Refuses replay text that evaluate scores: a low perplexity would then only mean that the model has memorized it.

    name: of the scored text, for the error message; folder, workers: see leakage().

    Raises InputError if more than 1% of the 13-word sequences of `scored` occur in the replay text.
    """
    share = leakage(replay, scored, folder, workers)
    if share is not None and share > MAX_LEAKAGE:
        raise InputError(
            f"train.replay: {share:.1%} of the {NGRAM_WORDS}-word sequences of {name} occur in the replay text, and "
            "evaluate scores them. Remove these texts from the folder, or use another one."
        )
