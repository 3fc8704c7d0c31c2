"""Source models in Hugging Face's layout: copied, or refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_meta import Weights, convert_default, read_weights, rewrite_json, write_tiny_meta
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pdf2lora.errors import InputError
from pdf2lora.weights.conversion import convert
from pdf2lora.weights.huggingface_files import ROPE_TYPES


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
    assert calls[-1][0] == calls[-1][1]
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


@pytest.mark.parametrize("num_files", [1, 5])
def test_a_missing_prefix_is_added_to_the_names(source: Path, target: Path, tmp_path: Path, num_files: int) -> None:
    weights = read_weights(source)
    if num_files == 1:
        shutil.rmtree(source)
        convert_default(tmp_path / "tiny", source)
    for file in source.glob("*.safetensors"):
        save_file({name.removeprefix("model."): weight for name, weight in load_file(file).items()}, file)
    if num_files > 1:
        index = source / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        rewrite_json(index, weight_map={name.removeprefix("model."): file for name, file in weight_map.items()})

    convert_default(source, target)

    converted = read_weights(target)
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())
    AutoModelForCausalLM.from_pretrained(target, local_files_only=True)


def test_byte_order_marks_are_removed(source: Path, target: Path) -> None:
    names = [file.name for file in source.glob("*.json")]
    contents = {name: (source / name).read_text(encoding="utf-8") for name in names}
    for name in names:
        (source / name).write_text(contents[name], encoding="utf-8-sig")

    convert_default(source, target)

    assert {name: (target / name).read_text(encoding="utf-8") for name in names} == contents


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["lack the weights of layer 2, but num_hidden_layers in config.json is 3"]),
        ({"tie_word_embeddings": False}, ["lack the weight lm_head.weight"]),
        (
            {"intermediate_size": 80},
            ["with the sizes in this file, model.layers.0.mlp.down_proj.weight must have shape"],
        ),
        ({"attention_bias": True}, ["lack the weight model.layers.0.self_attn.k_proj.bias"]),
        ({"model_type": "nope"}, ["config.json: transformers", "cannot load this model", "use another model"]),
        ({"model_type": "nope", "auto_map": {}}, ["Its own code (auto_map in config.json) is not run"]),
        ({"hidden_act": "nope"}, ["cannot load this model (KeyError: 'nope')"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["cannot load this model", "factor"]),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    source: Path, target: Path, changes: dict[str, Any], words: list[str]
) -> None:
    rewrite_json(source / "config.json", **changes)

    with pytest.raises(InputError) as caught:
        convert_default(source, target)

    assert all(word in str(caught.value) for word in [str(source), *words]), str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(target.iterdir()) == []


def rewrite_weights(source: Path, change: Callable[[Weights], Any]) -> None:
    """All weights in one file, changed."""
    weights = read_weights(source)
    change(weights)
    for path in source.glob("model*.safetensors*"):
        path.unlink()
    save_file(weights, source / "model.safetensors", {"format": "pt"})


def test_an_unknown_weight_is_refused(source: Path, target: Path) -> None:
    """transformers would ignore the weight, so it would load another model."""
    rewrite_weights(source, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))

    with pytest.raises(InputError, match=r"q_proj.bias is not part of a LlamaForCausalLM with this config.json"):
        convert_default(source, target)


@pytest.mark.parametrize("case", ["inverse frequencies", "F32 norms and BF16", "stored copy of the tied head"])
def test_common_peculiarities_are_accepted(source: Path, target: Path, case: str) -> None:
    def change(weights: Weights) -> None:
        if case == "inverse frequencies":
            weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in (0, 1)}
        elif case == "F32 norms and BF16":
            weights |= {name: weight.bfloat16() for name, weight in weights.items() if weight.dim() == 2}
        else:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    expected = convert_default(source, target.with_name("plain"))
    rewrite_weights(source, change)

    summary = convert_default(source, target)

    assert summary["num_parameters"] == expected["num_parameters"]
    assert summary["dtype"] == ("bfloat16" if case == "F32 norms and BF16" else "float32")
    assert torch.allclose(logits(target), logits(source), atol=1e-5)


def test_a_head_that_differs_from_the_embedding_is_not_tied(source: Path, target: Path) -> None:
    """transformers uses the stored head, also if config.json ties it. The packed layers must do the same."""
    rewrite_weights(
        source, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] * 2})
    )

    summary = convert_default(source, target)

    assert not summary["tied"]
    assert not json.loads((target / "config.json").read_text())["tie_word_embeddings"]
    assert torch.allclose(logits(target), logits(source), atol=1e-5)


def test_a_tied_model_may_store_only_its_head(source: Path, target: Path) -> None:
    expected = logits(source)
    rewrite_weights(
        source, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")})
    )

    assert convert_default(source, target)["tied"]

    assert "model.embed_tokens.weight" in read_weights(target)
    assert torch.allclose(logits(target), expected, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192},
        {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    ],
    ids=lambda rope: rope.get("rope_type", rope.get("type")),
)
def test_known_rope_types_are_accepted(source: Path, target: Path, rope: dict[str, Any]) -> None:
    extra = {"original_max_position_embeddings": 64} if rope.get("type") == "longrope" else {}
    rewrite_json(source / "config.json", without="rope_parameters", rope_scaling=rope, **extra)

    convert_default(source, target)

    assert torch.equal(logits(target), logits(source))


def test_the_rope_types_are_those_of_transformers() -> None:
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS}


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return Tensor(model(torch.arange(40)[None]).logits)


class TestCompletedConfig:
    """The config.json of models/base always has the keys that the pipeline reads."""

    def completed(self, source: Path, target: Path) -> dict[str, Any]:
        convert_default(source, target)
        config = json.loads((target / "config.json").read_text())
        return {key: config[key] for key in ("bos_token_id", "eos_token_id", "max_position_embeddings")}

    @pytest.mark.parametrize("missing", ["bos_token_id", "eos_token_id"])
    @pytest.mark.parametrize("is_null", [False, True])
    def test_special_tokens_are_found_elsewhere(self, source: Path, target: Path, missing: str, is_null: bool) -> None:
        changes = {missing: None} if is_null else {}
        expected = self.completed(source, target.with_name("plain"))
        rewrite_json(source / "config.json", without=None if is_null else missing, **changes)

        assert self.completed(source, target) == expected

        rewrite_json(source / "generation_config.json", without=missing)
        assert self.completed(source, target.with_name("other")) == expected  # from the tokenizer

    def test_a_missing_context_length_is_transformers_default(self, source: Path, target: Path) -> None:
        rewrite_json(source / "config.json", without="max_position_embeddings")

        assert self.completed(source, target)["max_position_embeddings"] == 2048

    def test_a_model_without_eos_is_refused(self, source: Path, target: Path) -> None:
        for name in ("config.json", "generation_config.json"):
            rewrite_json(source / name, without="eos_token_id")
        rewrite_json(source / "tokenizer_config.json", without="eos_token")

        with pytest.raises(InputError, match=r"config.json: eos_token_id is missing, .* Add the id"):
            convert_default(source, target)

    @pytest.mark.parametrize("eos", [520, [], [1, -1]])
    def test_an_eos_that_is_not_a_token_id_is_refused(self, source: Path, target: Path, eos: Any) -> None:
        rewrite_json(source / "config.json", eos_token_id=eos)

        with pytest.raises(InputError, match=r"eos_token_id is .*; it must be an id below vocab_size \(520\)"):
            convert_default(source, target)

    def test_a_bos_that_the_tokenizer_never_writes_is_not_used(self, source: Path, target: Path) -> None:
        """Qwen, SmolLM2 and Granite have a bos_token_id, and were trained without it."""
        rewrite_json(source / "tokenizer.json", post_processor=None)

        assert self.completed(source, target)["bos_token_id"] is None

    @pytest.mark.parametrize(("add_bos_token", "bos"), [(True, 264), (False, None)])
    def test_add_bos_token_decides(self, source: Path, target: Path, add_bos_token: bool, bos: int | None) -> None:
        rewrite_json(source / "tokenizer.json", post_processor=None)
        rewrite_json(source / "tokenizer_config.json", add_bos_token=add_bos_token)

        assert self.completed(source, target)["bos_token_id"] == bos
