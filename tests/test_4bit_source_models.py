"""A source model that is stored in 4 bits (bitsandbytes): it is used as it is and never merged."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_families import write_tiny_family
from tiny_llama import COMPUTE, QUANTIZATION
from tiny_meta import convert_default, rewrite_json
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pdf2lora.errors import InputError
from pdf2lora.model.loading import load_base
from pdf2lora.weights.merge import merge

TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    plain = write_tiny_family(folder / "plain", "LlamaForCausalLM", "llama")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder / "quantized")
    shutil.copy(plain / "tokenizer.json", folder / "quantized")
    return folder / "quantized"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_it_is_used_as_it_is(source: Path, tmp_path: Path) -> None:
    summary = convert_default(source, tmp_path / "base")

    assert (tmp_path / "base/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(source.with_name("plain"))
    assert summary["num_parameters"] == plain.num_parameters()
    expected = load_base(source.with_name("plain"), QUANTIZATION, COMPUTE)(TOKENS).logits
    assert torch.equal(load_base(tmp_path / "base", QUANTIZATION, COMPUTE)(TOKENS).logits, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 64}, "down_proj.weight must have shape"),
        ({"attention_bias": True}, "lack the weight model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_sizes_that_contradict_the_weights_are_refused(
    source: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    rewrite_json(changed / "config.json", **changes)

    with pytest.raises(InputError, match=words):
        convert_default(changed, tmp_path / "base")


def test_it_cannot_be_merged(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stored in 4 bits. Train on the unquantized model to merge"):
        merge(source, tmp_path, tmp_path)
