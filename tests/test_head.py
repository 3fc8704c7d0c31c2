"""The head against transformers' own logits and loss, for families with special heads."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny_config, write_tiny_family
from tiny_llama import COMPUTE, LORA, QUANTIZATION, changed, quiet, write_tiny_llama
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.families import FAMILIES
from pdf2lora.model import head
from pdf2lora.model.forward import build_forward
from pdf2lora.model.head import Head, check_causal_lm, decoder_of
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.model.loss import linear_cross_entropy

pytestmark = quiet
AUTO = changed(COMPUTE, attention="auto")
IDS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
TARGETS = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def random_model(model_type, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("cohere", {"logit_scale": 0.25}, (0.25, None, False)),
        ("granite", {"logits_scaling": 4.0}, (0.25, None, False)),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}, (1.0, 2.0, False)),
        ("phi", {}, (1.0, None, True)),
        ("gpt2", {"n_embd": 64, "n_layer": 1, "n_head": 4}, (1.0, None, False)),
    ],
)
def test_special_heads(model_type, settings, expected):
    model = random_model(model_type, **(SMALL | settings))
    head = Head.of(model)

    check_causal_lm(model)

    assert (head.scale, head.softcap, head.bias is not None) == expected
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=IDS).last_hidden_state
        loss = linear_cross_entropy(hidden.flatten(0, 1), head, TARGETS.flatten())
        logits = model(input_ids=IDS).logits
    expected_loss = functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)


def test_model_that_sees_later_tokens_is_refused():
    model = random_model("llama", **SMALL, intermediate_size=64, is_causal=False)

    with pytest.raises(InputError, match="LlamaForCausalLM; its logits depend on later tokens"):
        check_causal_lm(model)


def test_head_with_other_steps_is_refused():
    model = random_model("bert", **SMALL, intermediate_size=64, is_decoder=True)

    with pytest.raises(InputError, match="BertLMHeadModel; its logits are not a product"):
        check_causal_lm(model)


def test_check_leaves_the_model_in_its_mode():
    model = random_model("llama", **SMALL, intermediate_size=64).train()

    check_causal_lm(model)

    assert model.training


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_each_family_has_the_loss_of_transformers_and_trains(family, tmp_path):
    """On the reference kernels, in 16 bits and in 4 bits."""
    folder = write_tiny_family(tmp_path / "base", family.architecture, family.model_type)
    whole = load_base(folder, changed(QUANTIZATION, bits=16), AUTO)
    with torch.no_grad():
        expected = whole.eval()(input_ids=IDS, labels=IDS).loss * IDS[:, 1:].numel()
        forward = build_forward(whole, "reference")
        loss = linear_cross_entropy(forward(IDS).flatten(0, 1), forward.head, TARGETS.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)

    model = add_lora(load_base(folder, QUANTIZATION, AUTO), changed(LORA, target_modules="all-linear")).train()
    forward = build_forward(model, "reference", "full")
    forward.set_dropout(0, 0)
    linear_cross_entropy(forward(IDS).flatten(0, 1), forward.head, TARGETS.flatten()).backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    num_linear = sum(isinstance(module, torch.nn.Linear) for name, module in whole.named_modules() if ".0." in name)
    assert len(found) == 2 * 2 * num_linear  # A and B in two layers
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(gradient.any() for name, gradient in found.items() if "lora_B" in name)


def test_base_models_own_dropout_is_off(tmp_path):
    config = AutoConfig.for_model(
        "gpt2", vocab_size=97, n_embd=64, n_layer=1, n_head=4, resid_pdrop=0.5, attn_pdrop=0.5
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_base(tmp_path, changed(QUANTIZATION, bits=16), AUTO)

    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_tiny_configurations_are_those_of_the_table():
    for family in FAMILIES.values():
        assert tiny_config(family.architecture, family.model_type).model_type == family.model_type


def test_outliers_of_a_later_token_do_not_change_the_check_in_8_bits(tmp_path, monkeypatch):
    """LLM.int8 computes the column of an outlier in half precision for all tokens. Here the last token has one."""
    folder = write_tiny_llama(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    last_token = (7 * 37 % 97) + 1
    weights["model.embed_tokens.weight"][last_token] = 0
    weights["model.embed_tokens.weight"][last_token, 0] = 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(head, "TOLERANCE_8_BIT", 1e-6)

    model = load_base(folder, changed(QUANTIZATION, bits=8), AUTO)

    assert model.model.layers[0].self_attn.q_proj.state.threshold == 6.0
