"""The layout of a source model, and folders that have none."""

import json
from pathlib import Path

import pytest

from pdf2lora.errors import InputError
from pdf2lora.weights.layout import find_layout


@pytest.mark.parametrize(
    ("name", "layout"), [("config.json", "huggingface"), ("params.json", "meta"), ("consolidated.00.pth", "meta")]
)
def test_layouts(tmp_path: Path, name: str, layout: str) -> None:
    (tmp_path / name).touch()

    assert find_layout(tmp_path) == layout


def test_meta_s_files_in_the_hub_s_subfolder_must_be_moved(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original/params.json").touch()

    words = f"{tmp_path}: Meta's files are in {tmp_path}/original, .* mv {tmp_path}/original/\\* {tmp_path}$"
    with pytest.raises(InputError, match=words):
        find_layout(tmp_path)


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model"}))
    (tmp_path / "adapter_model.safetensors").touch()

    with pytest.raises(InputError, match=r"this is an adapter, not a base model. Download .* trained on \(org/model\)"):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("model-q4.gguf", "only in GGUF files. Download"), ("pytorch_model.bin", r"only in pickled \*.bin files")],
)
def test_other_formats_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).touch()

    with pytest.raises(InputError, match=words):
        find_layout(tmp_path)


def test_mistral_s_own_layout_is_refused(tmp_path: Path) -> None:
    for name in ("params.json", "consolidated.safetensors", "tekken.json"):
        (tmp_path / name).touch()

    with pytest.raises(InputError, match=r"the layout of Mistral's own programs .* in Hugging Face's layout"):
        find_layout(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no source model is there.*params.json.*config.json"):
        find_layout(tmp_path)
