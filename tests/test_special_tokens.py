"""BOS and EOS where the authors of a model put them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import BOS, EOS, PAD, SPECIAL_TOKENS, byte_tokenizer
from tokenizers import processors

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface_files import load_tokenizer
from pdf2lora.weights.special_tokens import find_bos, find_eos

BOS_TOKEN, EOS_TOKEN = SPECIAL_TOKENS[:2]


def test_padding_of_tokenizer_json_is_not_bos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, BOS)]
    )
    tokenizer.enable_padding(direction="left", pad_id=PAD, length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    assert find_bos(load_tokenizer(tmp_path / "tokenizer.json"), {}) == BOS


def test_two_tokens_before_a_text_are_refused() -> None:
    """As in GLM-4: [gMASK] <sop>."""
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} {EOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, BOS), (EOS_TOKEN, EOS)]
    )

    with pytest.raises(InputError, match=r"puts 2 tokens before a text \(<\|begin_of_text\|> <\|end_of_text\|>\)"):
        find_bos(tokenizer, {})


@pytest.mark.parametrize(
    ("template", "config", "bos"),
    [
        (None, {}, None),  # as in Qwen, SmolLM2, Granite
        (f"{BOS_TOKEN} $A", {}, BOS),
        (f"{BOS_TOKEN} $A {EOS_TOKEN}", {}, BOS),
        (f"$A {EOS_TOKEN}", {}, None),
        (f"{BOS_TOKEN} $A", {"add_bos_token": False}, None),
        (None, {"add_bos_token": True, "bos_token": BOS_TOKEN}, BOS),
        (None, {"add_bos_token": True, "bos_token": {"content": BOS_TOKEN}}, BOS),
        (None, {"add_bos_token": True, "bos_token": None}, None),
    ],
)
def test_bos_is_the_token_that_the_tokenizer_writes(
    template: str | None, config: dict[str, Any], bos: int | None
) -> None:
    tokenizer = byte_tokenizer()
    if template is not None:
        special = [(BOS_TOKEN, BOS), (EOS_TOKEN, EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)

    assert find_bos(tokenizer, config) == bos


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer_config", "eos"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, {"eos_token": EOS_TOKEN}, 7),
        ({"eos_token_id": [7, 9]}, {}, {}, [7, 9]),
        ({}, {"eos_token_id": 8}, {"eos_token": EOS_TOKEN}, 8),
        ({"eos_token_id": None}, {}, {"eos_token": EOS_TOKEN}, EOS),
    ],
)
def test_eos_is_found_in_this_order(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], tokenizer_config: dict[str, Any], eos: object
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))

    assert find_eos(tmp_path, {"vocab_size": 260} | config, byte_tokenizer(), tokenizer_config) == eos


@pytest.mark.parametrize("eos", [260, -1, True, "2", [], [1, "2"]])
def test_an_eos_that_is_not_a_token_id_is_refused(tmp_path: Path, eos: object) -> None:
    with pytest.raises(InputError, match=r"eos_token_id is .*; it must be an id below vocab_size \(260\)"):
        find_eos(tmp_path, {"vocab_size": 260, "eos_token_id": eos}, byte_tokenizer(), {})


def test_a_missing_eos_is_reported_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.json: eos_token_id is missing, .* Add the id"):
        find_eos(tmp_path, {"vocab_size": 260}, byte_tokenizer(), {})
