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


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model"}))
    (tmp_path / "adapter_model.safetensors").touch()

    with pytest.raises(InputError, match=r"this is an adapter, not a base model. Download .* trained on \(org/model\)"):
        find_layout(tmp_path)


def test_an_adapter_in_the_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).touch()

    with pytest.raises(InputError, match=r"has a model and an adapter .* Move the adapter's files away"):
        find_layout(tmp_path)


@pytest.mark.parametrize("file", ["SmolLM2-135M/config.json", "original/params.json", "snapshots/93efa2f/config.json"])
def test_files_in_a_subfolder_must_be_copied(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()

    folder = (tmp_path / file).parent
    with pytest.raises(
        InputError, match=rf"the model's files are in {folder}\. Copy them: cp -L {folder}/\* {tmp_path}$"
    ):
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
