"""The table of families against transformers: entries, conversion, merging, and the commands after a training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from example_run import write_run
from helpers import prose
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import LLAMA_LAYERS, tiny_config, write_tiny_family
from tiny_llama import COMPUTE, EOS, LORA, changed, fill_b, quiet, random_sequences, write_split
from tiny_meta import convert_default
from tiny_training import build_learner
from transformers import AutoModelForCausalLM, PreTrainedModel

from commands import export, generate
from pdf2lora.families import FAMILIES, Family
from pdf2lora.weights.merge import merge, read_adapter

Converted = Callable[[str], tuple[Path, Path]]
MODEL_TYPES = {family.architecture: family.model_type for family in FAMILIES.values()} | {"GPT2LMHeadModel": "gpt2"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_an_entry_has_the_class_of_transformers(family: Family) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family.architecture, family.model_type))

    assert type(model).__name__ == family.architecture


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.is_fused], ids=lambda family: family.model_type)
def test_a_fused_entry_describes_the_model_of_transformers(family: Family) -> None:
    config = tiny_config(family.architecture, family.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.get_submodule("model.layers.0")
    linear = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}

    assert linear.keys() == LLAMA_LAYERS
    has_bias = linear["self_attn.q_proj"].bias is not None
    assert family.qkv_bias == (has_bias or hasattr(config, "attention_bias"))
    assert family.mlp_bias == hasattr(config, "mlp_bias")
    assert family.rope_in_some_layers == hasattr(config, "no_rope_layers")
    assert family.sliding_window == ("sliding_window" in config.to_dict())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The source and the converted model of an architecture, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def convert(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            source = write_tiny_family(
                folder / "source", architecture, MODEL_TYPES[architecture], max_shard_size="200KB"
            )
            convert_default(source, folder / "base")
            made[architecture] = source, folder / "base"
        return made[architecture]

    return convert


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_the_converted_model_equals_transformers(converted: Converted, architecture: str) -> None:
    source, base = converted(architecture)

    assert len(list(base.glob("*.safetensors"))) > 1
    assert type(load(base)).__name__ == architecture
    assert torch.equal(logits(load(base)), logits(load(source)))
    config = json.loads((base / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, EOS)  # the tokenizer writes no BOS


@quiet
@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_the_merged_model_equals_base_and_adapter(converted: Converted, tmp_path: Path, architecture: str) -> None:
    _, base = converted(architecture)
    torch.manual_seed(0)
    adapted = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    fill_b(adapted).save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()

    num_merged = merge(base, tmp_path / "adapter", tmp_path / "merged")

    assert num_merged == len(read_adapter(tmp_path / "adapter"))
    merged = logits(load(tmp_path / "merged"))
    assert torch.allclose(merged, logits(adapted), atol=1e-4)
    assert not torch.allclose(merged, logits(load(base)), atol=1e-2)


@quiet
@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_training_generate_and_export_work(
    converted: Converted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_params: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    architecture: str,
) -> None:
    _, base = converted(architecture)
    lora, compute = changed(LORA, target_modules="all-linear", lora_dropout=0), changed(COMPUTE, attention="auto")
    learner = build_learner(base, lora=lora, compute=compute)
    rows, losses = np.arange(2), []
    for step in range(4):
        learner.step(random_sequences(2), rows, step)
        losses.append(float(learner.parameters.loss))
    assert losses[-1] < losses[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate"])
    monkeypatch.setenv("PROMPT", "The sea")
    monkeypatch.setattr(export, "require_current_adapter", lambda: None)
    write_params({"sample.max_new_tokens": 3, "compute.seq_length": 32, "evaluate.stride": 32})
    write_run(tmp_path)
    write_split(tmp_path, "test", [prose(1, 10)], base)
    (tmp_path / "models/base").symlink_to(base)
    learner.model.save_pretrained("models/adapter")

    generate.main()
    assert capsys.readouterr().out.count("The sea") == 2
    export.main()

    adapted = PeftModel.from_pretrained(load(base), "models/adapter")
    assert torch.allclose(logits(load(Path("models/merged"))), logits(adapted), atol=1e-4)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of 48 tokens: more than the sliding windows."""
    tokens = torch.arange(48)[None] * 5
    with torch.no_grad():
        return torch.as_tensor(model.eval()(tokens).logits)
