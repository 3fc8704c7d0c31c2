"""Meta's params.json: damaged numbers, the Llama version, the feed-forward size."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_meta import make_params

from pdf2lora.errors import InputError
from pdf2lora.weights.params_json import VERSIONS, ModelArgs, read_model_args


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    return tmp_path / "tiny/params.json"


def read(file: Path, version: str, params: dict[str, Any]) -> ModelArgs:
    file.write_text(json.dumps(params))
    return read_model_args(file, version)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": None}, "params.json: dim is null; it must be a whole number from 1"),
        ({"dim": 10**12}, "dim is 1000000000000; it must be a whole number from 1 to 1048576"),
        ({"n_heads": 0}, "n_heads is 0; it must be"),
        ({"n_heads": "4"}, 'n_heads is "4"; it must be'),
        ({"n_heads": True}, "n_heads is true; it must be"),
        ({"n_heads": 5}, "dim is 64; it must be a multiple of 2 * n_heads (10)"),
        ({"n_kv_heads": 3}, "n_heads is 4; it must be a multiple of n_kv_heads (3)"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it must be a number above 0"),
        ({"norm_eps": None}, "norm_eps is null; it must be a number above 0"),
        ({"rope_theta": "x"}, 'rope_theta is "x"; it must be a number above 0'),
        ({"multiple_of": 0}, "multiple_of is 0; it must be a whole number"),
    ],
)
def test_a_wrong_number_is_refused(file: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        read(file, "3.2", make_params("3.2", **changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "params.json: the file is missing"),
        ("{", "params.json: this is not valid JSON"),
        ("[]", "params.json: the file must be a JSON object"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, content: str | None, words: str) -> None:
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=re.escape(words)):
        read_model_args(file, "3.2")


@pytest.mark.parametrize(
    ("version", "is_scaled", "words"),
    [
        ("3", True, 'models.tiny.llama_version is "3", which has no scaled rope. Set .* (3.1 or 3.2 or 3.3)'),
        ("3.1", False, 'is "3.1", which has scaled rope (factor 8). Set .* (1 or 2 or 3)'),
        ("3.2", None, 'use_scaled_rope is false, but models.tiny.llama_version is "3.2", which has scaled rope'),
        ("2", True, 'models.tiny.llama_version is "2", which has no scaled rope'),
    ],
)
def test_scaled_rope_must_fit_the_version(file: Path, version: str, is_scaled: bool | None, words: str) -> None:
    params = make_params("3") | ({} if is_scaled is None else {"use_scaled_rope": is_scaled})
    with pytest.raises(InputError, match=re.escape(words).replace(r"\.\*", ".*")):
        read(file, version, params)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"dim": 4096, "n_heads": 32, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 4096, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama 3 8B
        ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # Llama 3 70B
    ],
)
def test_feed_forward_size_by_meta_s_rule(file: Path, params: dict[str, Any], expected: int) -> None:
    assert read(file, "3", params | {"n_layers": 2, "norm_eps": 1e-5}).hidden_dim == expected


def test_versions() -> None:
    assert list(VERSIONS) == ["1", "2", "3", "3.1", "3.2", "3.3"]
