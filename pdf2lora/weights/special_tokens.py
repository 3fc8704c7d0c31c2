"""Finds BOS and EOS of a model in Hugging Face's layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdf2lora.errors import InputError
from pdf2lora.weights.json_files import read_json


def find_bos(tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any]) -> int | None:
    """The token that the tokenizer puts before a text; None if it puts none there.

    Many models have a bos_token_id in config.json that their tokenizer never writes (Qwen, SmolLM2, Granite). Their
    authors trained them without it.

    Raises InputError if the tokenizer puts several tokens there: config.json has room for one.
    """
    if tokenizer_config.get("add_bos_token") is False:
        return None
    with_special, without = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
    if with_special[: len(without)] != without:
        starts = range(len(with_special) - len(without) + 1)
        num_before = next((start for start in starts if with_special[start : start + len(without)] == without), 1)
        if num_before > 1:
            tokens = " ".join(str(tokenizer.id_to_token(number)) for number in with_special[:num_before])
            raise InputError(
                f"tokenizer.json: the tokenizer puts {num_before} tokens before a text ({tokens}); only one is "
                "supported. Use another base model."
            )
        return int(with_special[0])
    if tokenizer_config.get("add_bos_token") is True:
        return _token_id(tokenizer, tokenizer_config.get("bos_token"))
    return None


def find_eos(
    source: Path, config: Mapping[str, Any], tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any]
) -> int | list[int]:
    """eos_token_id of config.json, else of generation_config.json, else the eos_token of tokenizer_config.json.

    Raises InputError if no file has it, or it is not the id of a row in the embedding.
    """
    path = source / "config.json"
    eos = config.get("eos_token_id")
    if eos is None and (source / "generation_config.json").is_file():
        path = source / "generation_config.json"
        eos = read_json(path).get("eos_token_id")
    if eos is None:
        path = source / "tokenizer_config.json"
        eos = _token_id(tokenizer, tokenizer_config.get("eos_token"))
    if eos is None:
        raise InputError(
            f"{source / 'config.json'}: eos_token_id is missing, also in generation_config.json and "
            "tokenizer_config.json. Add the id of the token that ends a text."
        )
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(number) is int and 0 <= number < config["vocab_size"] for number in ids):
        raise InputError(
            f"{path}: eos_token_id is {json.dumps(eos)}; it must be an id below vocab_size ({config['vocab_size']}) "
            "or a list of such ids. Correct the file."
        )
    return eos


def _token_id(tokenizer: Tokenizer, token: object) -> int | None:
    """The id of a token in tokenizer_config.json, which is a string or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if isinstance(content, str) else None
