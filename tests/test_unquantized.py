"""The unquantized base, even if it is larger than the GPU."""

import pytest
import torch
from tiny_llama import COMPUTE, QUANTIZATION, changed, quiet, write_tiny_llama

from pdf2lora.evaluation import unquantized

pytestmark = quiet


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


def test_is_not_quantized(base):
    model = unquantized.build_unquantized(base, QUANTIZATION, COMPUTE, "reference").model

    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(("free_share", "layers_on_gpu"), [(0.0, 0), (0.5, 2), (0.8, 3)])
def test_layers_that_do_not_fit_stay_in_host_memory(base, monkeypatch, free_share, layers_on_gpu):
    gpu = torch.device("cuda", 0)
    weights_gib = unquantized._weights_gib(base, COMPUTE)
    monkeypatch.setattr(unquantized, "device", lambda: gpu)
    monkeypatch.setattr(unquantized, "_free_gpu_gib", lambda: free_share * weights_gib)

    placement = unquantized._placement(base, COMPUTE)

    layers = [placement[f"model.layers.{number}"] for number in range(4)]
    assert layers == [gpu] * layers_on_gpu + ["cpu"] * (4 - layers_on_gpu)
    assert placement["lm_head"] == placement["model.embed_tokens"] == placement["model.norm"] == gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_layers_give_the_same_hidden_states(base, monkeypatch):
    ids = torch.arange(20, device="cuda")[None]
    with torch.no_grad():
        resident = unquantized.build_unquantized(base, QUANTIZATION, COMPUTE, "reference")(ids)
    monkeypatch.setattr(unquantized, "_free_gpu_gib", lambda: 0.0)

    offloaded = unquantized.build_unquantized(base, QUANTIZATION, COMPUTE, "fused")  # reference instead

    assert offloaded.model.hf_device_map["model.layers.0"] == "cpu"
    with torch.no_grad():
        torch.testing.assert_close(offloaded(ids), resident)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_kernels_give_the_hidden_states_of_the_reference(base):
    ids = torch.arange(40, device="cuda").view(2, 20)
    compute = changed(COMPUTE, compute_dtype="bfloat16")
    reference, fused = (
        unquantized.build_unquantized(base, QUANTIZATION, compute, kernels) for kernels in ("reference", "fused")
    )

    with torch.no_grad():
        difference = (fused(ids) - reference(ids)).float().norm() / reference(ids).float().norm()

    assert 0 < difference < 0.02
