"""The table of families against transformers."""

import pytest
import torch
from tiny_families import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from pdf2lora.weights.families import FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_an_entry_describes_the_model_of_transformers(family: Family) -> None:
    config = tiny_config(family.architecture, family.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules() if ".layers.0." in name}
    linear = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}

    assert type(model).__name__ == family.architecture
    assert linear.keys() == set(family.linear_layers)
    q_like = linear.get("q_proj", linear.get("qkv_proj"))
    assert q_like is not None
    assert (q_like.bias is not None) == (family.qkv_bias is True)
    assert (family.qkv_bias == "attention_bias") == hasattr(config, "attention_bias")
    if family.qk_norm is None:
        assert "q_norm" not in modules
    else:
        size = config.hidden_size if family.qk_norm == "features" else config.head_dim
        assert modules["q_norm"].weight.shape == (size,)
    assert family.explicit_head_dim == ("head_dim" in config.to_dict())
    assert family.sliding_window == ("sliding_window" in config.to_dict())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_tied_by_default(family: Family) -> None:
    config = AutoConfig.for_model(family.model_type, num_hidden_layers=1, head_dim=64)

    assert config.tie_word_embeddings == family.tied_by_default
