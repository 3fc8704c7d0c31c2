"""The choice of the layout, and what the conversion does not import."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_meta import convert_default, write_tiny_meta

from pdf2lora.errors import InputError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "base"


def test_an_unknown_version_is_refused(tmp_path: Path, target: Path) -> None:
    write_tiny_meta(tmp_path / "tiny", "3")

    with pytest.raises(InputError, match=r'models.tiny.llama_version: "4" is not.* Use one of 1, 2, 3, 3.1, 3.2'):
        convert_default(tmp_path / "tiny", target, "4")


def test_meta_s_files_in_the_hub_s_subfolder_must_be_moved(tmp_path: Path, target: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original/params.json").touch()

    words = f"{tmp_path}: Meta's files are in {tmp_path}/original, .* mv {tmp_path}/original/\\* {tmp_path}$"
    with pytest.raises(InputError, match=words):
        convert_default(tmp_path, target)


def test_a_folder_without_source_model_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(InputError, match=r"no source model is there.*params.json.*config.json"):
        convert_default(tmp_path, target)


def test_transformers_is_not_imported() -> None:
    heavy = "{'transformers', 'sentencepiece'}"
    code = f"import sys, pdf2lora.weights.conversion; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
