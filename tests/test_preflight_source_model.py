"""Findings about the source model, and settings that must fit it."""

import pytest
from helpers import REPOSITORY
from tiny_families import write_tiny_family
from tiny_llama import write_tiny_llama
from tiny_meta import rewrite_json, write_tiny_meta

from pdf2lora.errors import InputError
from pdf2lora.params import read_params
from pdf2lora.preflight.source_model import inspect_for, source_model


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The folder of the model `tiny`, which does not exist yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/source").mkdir(parents=True)
    return tmp_path / "models/source/tiny"


@pytest.fixture
def params_with(write_params):
    short = {"model": "tiny", "compute.seq_length": 64, "evaluate.stride": 32}
    return lambda **changes: read_params(write_params(short | changes))


def levels(findings):
    return [(finding.level, finding.subject) for finding in findings]


def test_a_hugging_face_folder_needs_no_entry_in_models(source, params_with):
    write_tiny_llama(source)

    findings, shape = source_model(params_with())

    assert levels(findings) == [("ok", "source model"), ("note", "licence")]
    assert findings[0].text == "models/source/tiny: LlamaForCausalLM, 0.00 GiB of weights"
    assert len(shape.blocks) == 2


def test_meta_s_layout_needs_the_version(source, params_with):
    write_tiny_meta(source, "3.1")

    findings, shape = source_model(params_with())
    assert (findings[0].level, shape) == ("problem", None)
    assert "models.tiny.llama_version is missing; models/source/tiny is in Meta's layout" in findings[0].text

    findings, shape = source_model(params_with(**{"models.tiny": {"llama_version": "3.1"}}))
    assert findings[0].text == "models/source/tiny: Meta's layout, 0.00 GiB of weights"


def test_a_git_lfs_pointer_is_named(source, params_with):
    write_tiny_meta(source, "3.1")
    (source / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")

    findings, _ = source_model(params_with(**{"models.tiny": {"llama_version": "3.1"}}))

    assert "consolidated.00.pth: this is a Git LFS pointer" in findings[0].text


def test_a_licence_is_named(source, params_with):
    write_tiny_llama(source)
    (source / "LICENSE").touch()

    findings, _ = source_model(params_with())

    assert findings[1].text == "LICENSE in models/source/tiny"


@pytest.mark.parametrize(
    ("architecture", "model_type", "level", "words"),
    [
        ("Qwen3ForCausalLM", "qwen3", "ok", "Qwen3ForCausalLM, 0.00 GiB of weights"),
        ("GemmaForCausalLM", "gemma", "ok", "GemmaForCausalLM, 0.00 GiB of weights"),
        ("StableLmForCausalLM", "stablelm", "note", "; this family was not compared with transformers"),
    ],
)
def test_the_family_is_named(source, params_with, architecture, model_type, level, words):
    write_tiny_family(source, architecture, model_type)

    findings, _ = source_model(params_with())

    assert findings[0].level == level
    assert words in findings[0].text


def test_target_modules_must_be_layers_of_the_model(source, params_with):
    write_tiny_family(source, "Phi3ForCausalLM", "phi3")

    with pytest.raises(InputError, match=r"q_proj is not a linear layer of tiny. Use some of .*qkv_proj"):
        inspect_for(params_with())
    inspect_for(params_with(**{"lora.target_modules": ["qkv_proj", "self_attn.o_proj"]}))
    inspect_for(params_with(**{"lora.target_modules": "all-linear"}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bits", 8, "quantization.bits is 8, but the source model tiny is stored with 4. Set it to 4"),
        ("bnb_4bit_quant_type", "fp4", "stored with nf4"),
        ("bnb_4bit_use_double_quant", False, "stored with True"),
    ],
)
def test_a_4bit_model_must_have_its_own_quantization(source, params_with, key, value, words):
    write_tiny_llama(source)
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    rewrite_json(source / "config.json", quantization_config=stored | {"bnb_4bit_use_double_quant": True})

    with pytest.raises(InputError, match=words):
        inspect_for(params_with(**{f"quantization.{key}": value}))
    inspect_for(params_with())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"compute.seq_length": 129}, "compute.seq_length is 129; the base model's context is 128 tokens"),
        (
            {"sample.max_new_tokens": 97},
            "sample.prompt_tokens (32) + sample.max_new_tokens (97) is 129; the base model's context is 128 tokens. "
            "Reduce one of them.",
        ),
        ({"compute.seq_length": 128, "sample.max_new_tokens": 96}, None),
    ],
)
def test_tokens_beyond_the_context_are_refused_before_the_first_stage(source, params_with, changes, line):
    write_tiny_llama(source)
    params = params_with(**{"sample.prompt_tokens": 32}, **changes)

    if line is None:
        inspect_for(params)
        return
    with pytest.raises(InputError) as caught:
        inspect_for(params)
    assert str(caught.value).startswith(line)


def test_the_context_of_meta_s_layout_is_that_of_the_version(source, params_with):
    write_tiny_meta(source, "3")
    settings = {"models.tiny": {"llama_version": "3"}}
    inspect_for(params_with(**settings, **{"compute.seq_length": 8192}))

    with pytest.raises(InputError, match=r"compute\.seq_length is 8193; the base model's context is 8192 tokens"):
        inspect_for(params_with(**settings, **{"compute.seq_length": 8193}))


def test_the_demo_can_be_used(monkeypatch, write_params):
    params = read_params(write_params())
    monkeypatch.chdir(REPOSITORY)

    assert source_model(params)[0][0].level == "ok"
