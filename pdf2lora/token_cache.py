"""The tokens of the last run of tokenize: texts that did not change are not encoded again."""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from pdf2lora.runtime.files import atomic_directory
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.token_files import TokenFile
from pdf2lora.tokens import Tokens

LOCK_TIMEOUT_S = 60.0  # experiments that run at the same time share the cache
ROW = np.dtype([("text", "S64"), ("tokens", "S64")])  # SHA-256 of the key and the text; SHA-256 of the tokens
ROWS = "_rows.npy"


class TokenCache:
    """A copy of data/tokens of the last run, and a row for each document in it."""

    def __init__(self, folder: Path, key: str):
        """folder: an existing folder. key: differs if something differs that can change the tokens of a text."""
        self.folder, self.key = folder, key
        self.num_new = 0  # texts that were encoded
        self._rows: dict[str, list[tuple[bytes, bytes]]] = {}  # of this run
        self._known: dict[bytes, tuple[bytes, Tokens]] = {}  # of the last run; the tokens are memory-mapped
        with exclusive_lock(folder, timeout_s=LOCK_TIMEOUT_S), suppress(ValueError, EOFError):  # a truncated file
            for file in (folder / "tokens").glob(f"*{ROWS}"):
                documents = TokenFile.open(file.parent, file.name.removesuffix(ROWS)).documents()
                for (text, digest), tokens in zip(np.load(file).tolist(), documents, strict=True):
                    self._known[text] = digest, tokens

    def encode(
        self, split: str, texts: Iterable[str], encode_new: Callable[[Iterator[str]], Iterator[Tokens]]
    ) -> Iterator[Tokens]:
        """The tokens of each text, from the cache or from encode_new, in the order of the texts."""
        rows = self._rows[split] = []
        waiting: deque[tuple[bytes, bytes, Tokens | None]] = deque()  # None: encode_new has the text

        def new_texts() -> Iterator[str]:
            for text in texts:
                key = _sha256((self.key + text).encode())
                digest, tokens = self._known.get(key, (b"", None))
                if tokens is not None and _sha256(tokens.data) != digest:  # damaged on the disk
                    tokens = None
                waiting.append((key, digest, tokens))
                if tokens is None:
                    self.num_new += 1
                    yield text

        def known() -> Iterator[Tokens]:
            """The tokens before the next new text."""
            while waiting and (tokens := waiting[0][2]) is not None:
                rows.append(waiting.popleft()[:2])
                yield tokens

        for tokens in encode_new(new_texts()):
            yield from known()
            rows.append((waiting.popleft()[0], _sha256(tokens.data)))
            yield tokens
        yield from known()

    def replace(self, tokens: Path) -> None:
        """Replaces the copy of the last run by one of this run.

        tokens: the folder data/tokens that was written with the results of encode().
        """
        with (
            exclusive_lock(self.folder, timeout_s=LOCK_TIMEOUT_S),
            atomic_directory(self.folder / "tokens") as partial_folder,
        ):
            for split, rows in self._rows.items():
                np.save(partial_folder / f"{split}{ROWS}", np.array(rows, dtype=ROW))
            shutil.copytree(tokens, partial_folder, dirs_exist_ok=True)


def _sha256(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
