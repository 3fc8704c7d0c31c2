"""Text of another kind that train mixes into the corpus, so that the adapted model forgets less (train.replay)."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import InputError
from pdf2lora.runtime.parallel import Workers
from pdf2lora.split.leakage import NGRAM_WORDS, leakage

MAX_LEAKAGE = 0.01  # share of 13-word sequences; common phrases give less


def read_replay(folder: Path) -> Iterator[str]:
    """Yields the documents of the folder, in the order of the files' names.

    A .txt file is one document in UTF-8; a byte order mark is not part of its text. A .jsonl file has the format of
    data/documents.jsonl and data/split.

    Raises InputError if the folder has no text, or a file is in another encoding or format.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".txt", ".jsonl"))
    if not files:
        raise InputError(f"train.replay: {folder} has no text. Put .txt files there, or data/documents.jsonl of PDFs.")
    for file in files:
        try:
            if file.suffix.lower() == ".txt":
                yield file.read_text(encoding="utf-8-sig")
            else:
                yield from (document.text for document in read_documents(file) if document.reason is None)
        except UnicodeDecodeError as error:
            raise InputError(f"train.replay: {file} is not UTF-8 ({error}). Convert it with iconv -t UTF-8.") from None
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(
                f"train.replay: a line of {file} has not the format of data/documents.jsonl ({error}). Put its texts "
                "into .txt files."
            ) from None


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
