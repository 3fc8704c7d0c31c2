"""Merged models against the base with its adapter: LoRA, rsLoRA, DoRA, several files, config.json."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapter import write_tiny_adapter
from tiny_llama import quiet
from transformers import LlamaForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.weights.merge import merge, read_adapter, write_config

pytestmark = quiet
VARIANTS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


@pytest.fixture
def folders(tmp_path, base):
    (tmp_path / "merged").mkdir()
    return SimpleNamespace(base=base, adapter=tmp_path / "adapter", merged=tmp_path / "merged")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_base_and_adapter(folders, variant):
    write_tiny_adapter(folders.adapter, folders.base, **VARIANTS[variant])

    assert merge(folders.base, folders.adapter, folders.merged) == 6

    adapted = logits(PeftModel.from_pretrained(load(folders.base), folders.adapter))
    assert torch.allclose(logits(load(folders.merged)), adapted, atol=1e-4)
    assert not torch.allclose(logits(load(folders.base)), adapted, atol=1e-1)


def test_only_adapted_weights_change_and_the_base_does_not(folders):
    before = (folders.base / "model.safetensors").read_bytes()
    write_tiny_adapter(folders.adapter, folders.base)

    merge(folders.base, folders.adapter, folders.merged)

    base, merged = (load_file(folder / "model.safetensors") for folder in (folders.base, folders.merged))
    assert list(base) == list(merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"{layer}.weight" for layer in read_adapter(folders.adapter)}
    assert (folders.base / "model.safetensors").read_bytes() == before
    assert not (folders.merged / "manifest.json").exists()
    assert (folders.merged / "tokenizer.json").read_bytes() == (folders.base / "tokenizer.json").read_bytes()


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base(folders, tmp_path):
    base = shutil.copytree(folders.base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: value.bfloat16() for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    write_tiny_adapter(folders.adapter, base)

    merge(base, folders.adapter, folders.merged)

    name = "model.layers.1.self_attn.v_proj"
    merged = load_file(folders.merged / "model.safetensors")[f"{name}.weight"]
    lora = read_adapter(folders.adapter)[name]
    exact = weights[f"{name}.weight"].bfloat16().float() + 4 * lora["lora_B.weight"] @ lora["lora_A.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_every_file_is_merged(folders, tmp_path):
    sharded = shutil.copytree(folders.base, tmp_path / "sharded")
    LlamaForCausalLM.from_pretrained(folders.base).save_pretrained(sharded, max_shard_size="100KB")
    (sharded / "model.safetensors").unlink()
    write_tiny_adapter(folders.adapter, folders.base)

    calls = []
    merge(sharded, folders.adapter, folders.merged, calls.append)

    assert len(list(folders.merged.glob("*.safetensors"))) > 1
    assert sum(calls) == 6
    adapted = logits(PeftModel.from_pretrained(load(folders.base), folders.adapter))
    assert torch.allclose(logits(load(folders.merged)), adapted, atol=1e-4)


def test_an_adapter_of_another_base_is_refused(folders, tmp_path):
    write_tiny_adapter(folders.adapter, folders.base)
    weights = load_file(folders.adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.7"): value for name, value in weights.items()},
        folders.adapter / "adapter_model.safetensors",
    )

    with pytest.raises(InputError, match=r"weights for model.layers.7.mlp.down_proj, but .* has no such layer. Train"):
        merge(folders.base, folders.adapter, folders.merged)


def test_a_full_disk_is_reported_before_anything_is_written(folders, monkeypatch):
    write_tiny_adapter(folders.adapter, folders.base)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))

    with pytest.raises(InputError, match=r"0\.0 GiB are needed, 0\.0 GiB are free"):
        merge(folders.base, folders.adapter, folders.merged)

    assert not list(folders.merged.iterdir())


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, {"rope_type": "llama3", "factor": 8.0}),
    ],
)
def test_config_has_the_names_of_transformers_4_too(tmp_path, rope, scaling):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"dtype": "bfloat16", "rope_parameters": rope}))

    write_config(file)

    config = json.loads(file.read_text())
    assert config["rope_parameters"] == rope
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (1e4, scaling, "bfloat16")
