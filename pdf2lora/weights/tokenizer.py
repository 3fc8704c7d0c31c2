"""Meta's tokenizer.model: sentencepiece or tiktoken, by the Llama version."""

from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.converted_tokenizer import ConvertedTokenizer
from pdf2lora.weights.params_json import version_key
from pdf2lora.weights.sentencepiece_files import convert_sentencepiece
from pdf2lora.weights.tiktoken_files import convert_tiktoken, is_tiktoken

SENTENCEPIECE_VERSIONS = ("1", "2")


def read_tokenizer(path: Path, llama_version: str) -> ConvertedTokenizer:
    """Reads a tokenizer.model as the tokenizer of `llama_version` ("1", "2": sentencepiece; later: tiktoken).

    Raises InputError if the file is missing or damaged, or it is of another kind than the version's.
    """
    require_tokenizer_kind(path, llama_version)
    content = path.read_bytes()
    if llama_version in SENTENCEPIECE_VERSIONS:
        tokenizer = convert_sentencepiece(content, path)
        if None in (tokenizer.bos_token, tokenizer.eos_token):
            raise InputError(f"{path}: BOS or EOS is missing; Llama 1 and 2 have both. Download the file again.")
        return tokenizer
    return convert_tiktoken(content, path, llama_version)


def require_tokenizer_kind(path: Path, llama_version: str) -> None:
    """Raises InputError if the file is missing, or of another kind than the version's."""
    if not path.is_file():
        raise InputError(f"{path}: the file is missing. Put the tokenizer.model of the source model there.")
    key = version_key(path.parent)
    has_ranks = is_tiktoken(path)
    if has_ranks and llama_version in SENTENCEPIECE_VERSIONS:
        raise InputError(
            f'{path}: this is a tiktoken file, which Llama 3 and later use, but {key} is "{llama_version}". '
            f"Correct {key}."
        )
    if not has_ranks and llama_version not in SENTENCEPIECE_VERSIONS:
        raise InputError(
            f'{path}: this is not a tiktoken file (lines of base64 and rank), which {key} "{llama_version}" uses. '
            f"Correct {key} (Llama 1 and 2 use sentencepiece files) or download the file again."
        )
