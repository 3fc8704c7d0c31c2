"""Source models in Hugging Face's layout: copied, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_meta import Weights, convert_default, write_tiny_meta

from pdf2lora.errors import InputError
from pdf2lora.weights.conversion import convert


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


def read_weights(folder: Path) -> Weights:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face folder of several files, and the other files of such folders."""
    write_tiny_meta(tmp_path / "tiny", "3.2", tied=True)
    folder = tmp_path / "hugging_face"
    convert_default(tmp_path / "tiny", folder, max_shard_gib=100_000 / 2**30)
    for name in ("README.md", "pytorch_model.bin", "model.gguf", "handler.py"):
        (folder / name).write_text("?")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # transformers 5 writes it for an Instruct model
    (folder / "original").mkdir()
    return folder


def test_is_copied_as_it_is(source: Path, target: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = convert(source, target, llama_version="3.2", max_shard_gib=2, progress=lambda *call: calls.append(call))
    expected = {path.name for kind in ("*.json", "*.safetensors", "*.jinja") for path in source.glob(kind)}
    assert {path.name for path in target.iterdir()} == expected
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in expected)
    assert calls[-1][0] == calls[-1][1] == sum((target / name).stat().st_size for name in expected)
    num_files = len(list(source.glob("*.safetensors")))
    assert summary == {
        "layout": "huggingface",
        "num_parameters": sum(weight.numel() for weight in read_weights(source).values()),
        "num_shards": num_files,
        "num_files": num_files,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 88,
        "vocab_size": 520,
        "tied": True,
        "dtype": "float32",
        "rope_theta": 500000.0,
        "rope_factor": 32.0,
        "context_length": 131072,
    }


def test_summary_equals_that_of_the_meta_layout(source: Path, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    meta = convert_default(tmp_path / "tiny", other)
    copied = convert_default(other, target)
    assert copied == meta | {"layout": "huggingface"}


def test_older_config(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (source / "config.json").write_text(json.dumps(config))
    summary = convert_default(source, target)
    assert (summary["rope_theta"], summary["rope_factor"], summary["dtype"]) == (500000.0, 32.0, "float32")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, ['["MistralForCausalLM"], must be ["LlamaForCausalLM"]']),
        ({"architectures": None}, ["config.json: architectures is null"]),
        ({"quantization_config": {}}, ["config.json: the source model is quantized. Use the unquantized one"]),
        (
            {"num_hidden_layers": 3},
            ["lack the weight model.layers.2.input_layernorm.weight", "Download all"],
        ),
        ({"num_hidden_layers": None}, ["num_hidden_layers is null, must be a whole number"]),
        ({"tie_word_embeddings": False}, ["lack the weight lm_head.weight"]),
        (
            {"vocab_size": 600},
            ["has 520 tokens, vocab_size in config.json is 600, model.embed_tokens.weight has 520 rows"],
        ),
        ("tokenizer.json", ["tokenizer.json: the file is missing"]),
        (
            "model-00002-of-00004.safetensors",
            ["model-00002-of-00004.safetensors: the file is not in the folder", "index.json names"],
        ),
        (
            "model.safetensors.index.json",
            ["only in pickled *.bin files", "Convert them to safetensors"],
        ),
    ],
)
def test_errors(source: Path, target: Path, damage: str | dict[str, Any], words: list[str]) -> None:
    if isinstance(damage, str):
        (source / damage).unlink()
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(InputError) as caught:
        convert_default(source, target)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(target.iterdir()) == []


def test_cut_weights(source: Path, target: Path) -> None:
    path = min(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{path}: this is not a safetensors file, or it is truncated"):
        convert_default(source, target)


def test_weights_outside_the_folder(source: Path, target: Path) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
    with pytest.raises(InputError, match=r"the file is not in the folder, but model.safetensors.index.json names it"):
        convert_default(source, target)


def test_damaged_tokenizer(source: Path, target: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: this is not a tokenizer \(.*\). Download the file again"):
        convert_default(source, target)
