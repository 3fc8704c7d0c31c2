import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig

from pdf2lora.families import FAMILIES
from pdf2lora.training.throughput import PEAK_TFLOPS, flop_per_token, model_flops_utilization, peak_flop_per_s

LLAMA_3B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


def on_meta(config):
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def llama_3b():
    return on_meta(LLAMA_3B)


def test_flop_of_a_3b_llama_by_hand(llama_3b):
    """3.21e9 weights, each in two products of 2 FLOP; 28 layers of causal attention over half a sequence."""
    assert flop_per_token(llama_3b, 512) == 4 * 3_212_574_720 + 28 * 6 * 2 * 3072 * 256


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 64}, {"num_key_value_heads": 24}, {"num_attention_heads": 48, "head_dim": None}]
)
def test_weights_are_those_of_the_linear_layers(changes):
    model = on_meta(LlamaConfig(**(LLAMA_3B.to_dict() | {"num_hidden_layers": 2} | changes)))
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))

    per_position = (flop_per_token(model, 513) - flop_per_token(model, 512)) * 1.0

    assert flop_per_token(model, 512) - 512 * per_position == pytest.approx(4 * weights)
    queries = model.model.layers[0].self_attn.q_proj.out_features
    assert per_position == 2 * 6 * queries


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 125),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_gpus_are_distinguished_by_name(gpu, tflops):
    assert peak_flop_per_s(gpu) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("gpu", ["NVIDIA RTX A4000", "NVIDIA RTX A3000 Laptop GPU", "NVIDIA L400", "Tesla T4", "cpu"])
def test_unknown_gpu_has_no_utilization(llama_3b, gpu):
    """A name that only begins with a known name is unknown."""
    assert peak_flop_per_s(gpu) is None
    assert model_flops_utilization(1000.0, llama_3b, 512, gpu) is None


def test_each_name_of_the_table_finds_itself():
    assert {name: peak_flop_per_s(f"NVIDIA {name}") for name in PEAK_TFLOPS} == {
        name: tflops * 1e12 for name, tflops in PEAK_TFLOPS.items()
    }


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [(family.architecture, family.model_type) for family in FAMILIES.values()]
    + [("GPT2LMHeadModel", "gpt2"), ("GPTNeoXForCausalLM", "gpt_neox"), ("OPTForCausalLM", "opt")]
    + [("FalconForCausalLM", "falcon"), ("MambaForCausalLM", "mamba")],
)
def test_every_family_has_a_utilization(architecture, model_type):
    """Their configurations name the sizes differently, or not at all. LoRA does not count."""
    model = on_meta(tiny_config(architecture, model_type))
    flop = flop_per_token(model, 16)

    targets = ["in_proj"] if model_type == "mamba" else "all-linear"
    with_lora = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))

    assert flop > 0
    assert flop_per_token(with_lora, 16) == flop
    assert 0 < model_flops_utilization(1000.0, with_lora, 16, "NVIDIA H200") < 1


def test_utilization_is_a_share_of_the_peak(llama_3b):
    at_peak = 989e12 / flop_per_token(llama_3b, 512)

    assert at_peak == pytest.approx(75_400, rel=1e-3)
    assert model_flops_utilization(at_peak / 2, llama_3b, 512, "NVIDIA H200") == pytest.approx(0.5)
