"""The choice of the layout."""

from pathlib import Path

import pytest
from tiny_meta import convert_default, write_tiny_meta

from pdf2lora.errors import InputError
from pdf2lora.weights.conversion import convert


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "base"


def test_an_unknown_version_is_refused(tmp_path: Path, target: Path) -> None:
    write_tiny_meta(tmp_path / "tiny", "3")

    with pytest.raises(
        InputError, match=r'models.tiny.llama_version is "4", which is not.* Use one of 1, 2, 3, 3.1, 3.2, 3.3'
    ):
        convert_default(tmp_path / "tiny", target, "4")


def test_meta_s_layout_needs_a_version(tmp_path: Path, target: Path) -> None:
    write_tiny_meta(tmp_path / "tiny", "3")
    target.mkdir()

    with pytest.raises(InputError, match=r"models.tiny.llama_version is missing; .* tiny: {llama_version: '3.2'}"):
        convert(tmp_path / "tiny", target, llama_version=None, max_shard_gib=2)
