"""The tokenizer of a source model in Hugging Face's layout: tokenizer.json, or a conversion of tokenizer.model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import write_json
from pdf2lora.weights.converted_tokenizer import TOKENIZER_CLASS
from pdf2lora.weights.huggingface_files import largest_token_id, load_tokenizer
from pdf2lora.weights.json_files import read_json
from pdf2lora.weights.params_json import require_version, version_key
from pdf2lora.weights.sentencepiece_files import convert_sentencepiece
from pdf2lora.weights.tiktoken_files import convert_tiktoken, is_tiktoken


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    """The content of tokenizer_config.json."""
    is_converted: bool
    """Whether tokenizer and config must be written, because the folder has no tokenizer.json."""

    def write(self, target: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json to the folder `target` if they were converted."""
        if self.is_converted:
            self.tokenizer.save(str(target / "tokenizer.json"))
            write_json(target / "tokenizer_config.json", self.config)


def read_huggingface_tokenizer(source: Path, llama_version: str | None, vocab_size: int) -> HuggingFaceTokenizer:
    """Reads the tokenizer in the folder `source`.

    llama_version: needed only for Llama 3's tokenizer.model, which does not contain its special tokens.
    vocab_size: rows of the embedding.

    Raises InputError if a file is damaged, cannot be converted, or has more tokens than the embedding has rows.
    """
    path = source / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if (source / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(load_tokenizer(source / "tokenizer.json"), config, is_converted=False)

    file = source / "tokenizer.model"
    content = file.read_bytes()
    require_tokenizer_version(source, llama_version)
    if is_tiktoken(file):
        converted = convert_tiktoken(content, file, require_version(source, llama_version))
    else:
        converted = convert_sentencepiece(content, file)
        if config.get("add_bos_token") is False:
            converted.tokenizer.post_processor = None
    _add_tokens(converted.tokenizer, config, source)
    last_id = largest_token_id(converted.tokenizer)
    if last_id >= vocab_size:
        raise InputError(
            f"{file}: the tokenizer has a token with the id {last_id}, but the embedding has {vocab_size} rows. "
            "Use the files of one model."
        )
    return HuggingFaceTokenizer(converted.tokenizer, converted.config() | config | TOKENIZER_CLASS, is_converted=True)


def require_tokenizer_version(source: Path, llama_version: str | None) -> None:
    """Raises InputError if the folder has only Llama 3's tokenizer.model, and the version is not known."""
    file = source / "tokenizer.model"
    if llama_version is not None or (source / "tokenizer.json").is_file():
        return
    if is_tiktoken(file):
        raise InputError(
            f"{file}: this is Llama 3's tiktoken file, which does not contain the special tokens. Download "
            f"tokenizer.json too, or add the version to params.yaml: {version_key(source)}"
        )


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], source: Path) -> None:
    """Adds the tokens that the authors added after the training of the tokenizer, with their ids.

    They are in tokenizer_config.json (added_tokens_decoder) or, in older folders, in added_tokens.json.
    """
    added: dict[int, AddedToken] = {}
    if (source / "added_tokens.json").is_file():
        for content, number in read_json(source / "added_tokens.json").items():
            if type(number) is not int:
                raise InputError(
                    f"{source / 'added_tokens.json'}: the id of {content!r} is {number!r}; it must be a number. "
                    "Correct it."
                )
            added[number] = AddedToken(content, special=True, normalized=False)
    try:
        for number, entry in config.get("added_tokens_decoder", {}).items():
            fields = {key: value for key, value in entry.items() if key != "content" and not key.startswith("_")}
            added[int(number)] = AddedToken(entry["content"], **fields)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{source / 'tokenizer_config.json'}: added_tokens_decoder must map an id to an object with `content` "
            f"({error}). Download the file again."
        ) from None
    for number in sorted(added):
        token = added[number]
        if tokenizer.id_to_token(number) == token.content:
            if token.special:
                tokenizer.add_special_tokens([token])
            continue
        next_id = tokenizer.get_vocab_size()
        if tokenizer.token_to_id(token.content) is not None or number != next_id:
            raise InputError(
                f"{source}: the added token {token.content!r} has the id {number}, but the next free id after "
                f"tokenizer.model is {next_id}. Make a tokenizer.json: "
                f'AutoTokenizer.from_pretrained("{source}").save_pretrained("{source}")'
            )
        tokenizer.add_tokens([token])
