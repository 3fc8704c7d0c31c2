"""Meta's tokenizer.model: the file's kind and whether it fits the Llama version."""

from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.converted_tokenizer import ConvertedTokenizer
from pdf2lora.weights.sentencepiece_files import convert_sentencepiece
from pdf2lora.weights.tiktoken_files import convert_tiktoken, is_tiktoken

SENTENCEPIECE_VERSIONS = ("1", "2")


def read_tokenizer(path: Path, *, llama_version: str, key: str) -> ConvertedTokenizer:
    """Reads a tokenizer.model as the tokenizer of `llama_version` ("1", "2": sentencepiece; later: tiktoken).

    key: in params.yaml, holds the version; error messages name it.

    Raises:
        InputError: the file is missing or damaged, or it is of another kind than the version's.
    """
    if not path.is_file():
        raise InputError(f"{path}: the file is missing. Put the tokenizer.model of the source model there.")
    content = path.read_bytes()
    if is_tiktoken(content):
        if llama_version in SENTENCEPIECE_VERSIONS:
            raise InputError(
                f'{path}: this is a tiktoken file, which Llama 3 and later use, but {key} is "{llama_version}". '
                f"Correct {key}."
            )
        return convert_tiktoken(content, path, llama_version)
    if llama_version in SENTENCEPIECE_VERSIONS:
        return convert_sentencepiece(content, path)
    raise InputError(
        f'{path}: this is not a tiktoken file (lines of base64 and rank), which {key} "{llama_version}" uses. '
        f"Correct {key} (Llama 1 and 2 use sentencepiece files) or download the file again."
    )
