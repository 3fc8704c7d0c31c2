"""lora.init_lora_weights: PEFT's matrices, the changed base, the same model after loading, the ordinary adapter."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from tiny_llama import COMPUTE, LORA, QUANTIZATION, changed, quiet, same, trainable
from transformers import LlamaForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.model.initialization import INITIAL, initialize, layer_names, restore_trained_base, unquantized_weights
from pdf2lora.model.loading import add_lora, load_adapter, load_base
from pdf2lora.runtime.distributed import Processes
from pdf2lora.weights.merge import merge
from pdf2lora.weights.plain_adapter import write_plain_adapter

pytestmark = quiet
IDS = torch.arange(40)[None]
CHANGE_BASE = ["pissa", "pissa_niter_4", "olora"]
ALL = [*CHANGE_BASE, "loftq"]


def lora_of(method, **changes):
    return changed(LORA, lora_dropout=0.0, init_lora_weights=method, **changes)


def load(base, bits=4):
    return load_base(base, changed(QUANTIZATION, bits=bits), COMPUTE)


def start(base, folder, method, *, bits=4, processes=None, seed=0, **changes):
    model = add_lora(load(base, bits), lora_of(method, **changes))
    processes = processes or Processes.alone(torch.device("cpu"))
    initialize(model, base, lora_of(method, **changes), seed=seed, folder=folder / INITIAL, processes=processes)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def distance(model, reference):
    return float((logits(model) - logits(reference)).norm() / logits(reference).norm())


def dequantized(layer):
    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()


def train(model):
    """Other matrices, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.02 * torch.randn_like(value)
    return model


@pytest.mark.parametrize("method", CHANGE_BASE)
def test_base_and_initial_adapter_are_the_original_model(base, tmp_path, method):
    model = start(base, tmp_path, method, bits=16)

    assert distance(model, load(base, 16)) < 1e-5
    with model.disable_adapter():
        assert distance(model, load(base, 16)) > 0.01


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_matrices_and_base_are_those_of_peft(base, tmp_path, method):
    settings = lora_of(method).model_dump()
    expected = get_peft_model(load(base, 16), LoraConfig(task_type="CAUSAL_LM", **settings))

    model = start(base, tmp_path, method, bits=16)

    for (name, value), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.allclose(value, other, atol=1e-6), name


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_corrects_the_quantization_of_each_layer(base, tmp_path, bits, use_rslora):
    model = start(base, tmp_path, "loftq", bits=bits, use_rslora=use_rslora)

    for name, weight in unquantized_weights(base, layer_names(model)):
        layer = model.get_submodule(f"base_model.model.{name}")
        error = weight - dequantized(layer.base_layer)
        correction = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        singular = torch.linalg.svdvals(error)
        assert float((error - correction).norm()) == pytest.approx(float(singular[LORA.r :].norm()), rel=1e-3)
    with model.disable_adapter():
        assert distance(model, load(base, bits)) == 0


@pytest.mark.parametrize("method", CHANGE_BASE)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_changed_base_is_quantized_like_the_base(base, tmp_path, method, bits):
    model = start(base, tmp_path, method, bits=bits)
    plain = add_lora(load(base, bits), lora_of(True))

    for name, weight in unquantized_weights(base, layer_names(model)):
        layer = model.get_submodule(f"base_model.model.{name}")
        rest = weight - layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        original = plain.get_submodule(f"base_model.model.{name}").base_layer
        assert type(layer.base_layer.weight) is type(original.weight)
        assert layer.base_layer.weight.dtype == original.weight.dtype
        error = float((dequantized(layer.base_layer) - rest).norm() / rest.norm())
        assert 0 < error < {4: 0.12, 8: 0.01}[bits]
        if bits == 4:
            state, expected = layer.base_layer.weight.quant_state, original.weight.quant_state
            assert (state.quant_type, state.nested, state.dtype) == (
                expected.quant_type,
                expected.nested,
                expected.dtype,
            )


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_loaded_adapter_gives_the_trained_model(base, tmp_path, method, bits):
    trained = train(start(base, tmp_path, method, bits=bits))
    trained.save_pretrained(tmp_path)
    loaded = load_adapter(load(base, bits), tmp_path)

    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load(base, bits)))
    restore_trained_base(loaded, base, tmp_path, lora_of(method))

    assert torch.equal(logits(loaded), logits(trained))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", CHANGE_BASE)
def test_the_ordinary_adapter_and_the_merged_model_are_the_trained_model(base, tmp_path, method, use_rslora):
    trained = train(start(base, tmp_path, method, bits=16, use_rslora=use_rslora))
    trained.save_pretrained(tmp_path / "adapter")
    for name in ("plain", "merged"):
        (tmp_path / name).mkdir()

    write_plain_adapter(tmp_path / "adapter", tmp_path / INITIAL, tmp_path / "plain")
    merge(base, tmp_path / "plain", tmp_path / "merged")

    assert distance(PeftModel.from_pretrained(load(base, 16), tmp_path / "plain"), trained) < 1e-4
    assert distance(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), trained) < 1e-4


def test_the_ordinary_adapter_does_not_correct_quantization(base, tmp_path):
    start(base, tmp_path, "loftq").save_pretrained(tmp_path / "adapter")
    (tmp_path / "plain").mkdir()

    write_plain_adapter(tmp_path / "adapter", tmp_path / INITIAL, tmp_path / "plain")

    assert distance(PeftModel.from_pretrained(load(base, 16), tmp_path / "plain"), load(base, 16)) < 1e-5


def test_a_resumed_training_reads_the_stored_matrices(base, tmp_path):
    first = start(base, tmp_path, "pissa_niter_4")

    assert same(trainable(start(base, tmp_path, "pissa_niter_4", seed=1)), trainable(first))
    shutil.rmtree(tmp_path / INITIAL)
    assert not same(trainable(start(base, tmp_path, "pissa_niter_4", seed=1)), trainable(first))


def test_each_process_computes_a_part_of_the_layers(base, tmp_path):
    """Runs both processes of a job one after the other. `gather` of the second one also returns the first part."""
    parts = []

    class Process(Processes):
        def __init__(self, index):
            self.index, self.count, self.device = index, 2, torch.device("cpu")

        def broadcast(self, value):
            return None

        def gather(self, value):
            parts.append(value)
            return parts

    with pytest.raises(KeyError):  # it has only its own part
        start(base, tmp_path / "first", "pissa_niter_4", processes=Process(1))
    model = start(base, tmp_path, "pissa_niter_4", processes=Process(0))

    assert len(parts[0]) == len(parts[1]) == 2 * 4
    assert same(trainable(model), trainable(start(base, tmp_path / "alone", "pissa_niter_4")))
    assert load_file(tmp_path / INITIAL / "adapter_model.safetensors").keys() == parts[0].keys() | parts[1].keys()


def test_a_rank_above_the_size_of_a_layer_is_refused(base, tmp_path):
    with pytest.raises(
        InputError, match=r"lora\.r is 48; with lora\.init_lora_weights pissa .* is 32 x 64\. Reduce it"
    ):
        start(base, tmp_path, "pissa", r=48)


def test_needs_the_unquantized_weights(base, tmp_path):
    with pytest.raises(InputError, match=r"base.* has none for model\.layers\.9\.mlp\.up_proj\. Use true"):
        list(unquantized_weights(base, ["model.layers.9.mlp.up_proj"]))
