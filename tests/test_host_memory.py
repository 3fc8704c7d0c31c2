"""preflight/host_memory.py on a shape of 3 billion parameters."""

import pytest
from helpers import REPOSITORY
from test_model_shape import LLAMA_3B
from tiny_llama import changed

from pdf2lora.params import read_params
from pdf2lora.preflight import environment
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.host_memory import host_memory, trained_base_gib, unquantized_base_gib


@pytest.fixture
def params_with(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    params = read_params()

    def build(*, bits=4, compute_dtype="auto", unquantized_base=True):
        return params.model_copy(
            update={
                "quantization": changed(params.quantization, bits=bits),
                "compute": changed(params.compute, compute_dtype=compute_dtype),
                "evaluate": changed(params.evaluate, unquantized_base=unquantized_base),
            }
        )

    return build


@pytest.mark.parametrize(
    ("changes", "gpu_gib", "needed_gib"),
    [
        ({}, None, 11.97),  # 3.21 billion weights of 4 bytes
        ({"compute_dtype": "bfloat16"}, None, 5.98),
        ({"bits": 16}, None, 0.0),
        ({"unquantized_base": False}, None, 0.0),
        ({}, 80, 0.0),
        ({}, 4, 2.78),  # 5.98 - 0.8 * 4
    ],
)
def test_the_unquantized_base_in_host_memory(params_with, changes, gpu_gib, needed_gib):
    gpus = [Gpu("some GPU", "580", gpu_gib, 9.0)] if gpu_gib else []

    assert unquantized_base_gib(params_with(**changes), LLAMA_3B, gpus) == pytest.approx(needed_gib, abs=0.01)


def test_an_unquantized_base_is_trained_in_float32_on_a_cpu(params_with):
    assert trained_base_gib(params_with(bits=16), LLAMA_3B, []) == pytest.approx(11.97, abs=0.01)
    assert trained_base_gib(params_with(bits=4), LLAMA_3B, []) < 3


def test_the_remedy_for_too_little_memory(params_with, monkeypatch):
    monkeypatch.setattr(environment, "available_bytes", lambda: 8 * 2**30)

    finding = host_memory(params_with(), LLAMA_3B, [])

    assert finding.level == "problem"
    assert "8.0 GiB free, about 13.5 GiB needed. Use evaluate.unquantized_base=false" in finding.text
    assert host_memory(params_with(unquantized_base=False), LLAMA_3B, []).level == "ok"
