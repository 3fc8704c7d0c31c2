"""preflight/placement.py on a shape of 8 billion parameters."""

from dataclasses import replace

import pytest
from helpers import REPOSITORY
from tiny_llama import QUANTIZATION, changed

from pdf2lora.params import read_params
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.model_shape import ModelShape
from pdf2lora.preflight.placement import placement, streams_layers

LAYERS = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096), "gate": (4096, 14336)}
LAYERS |= {"up": (4096, 14336), "down": (14336, 4096)}
SHAPE = ModelShape(32 * [LAYERS], 8_030_000_000, 16_060_000_000)
OTHER_FAMILY = replace(SHAPE, can_be_packed=False)


@pytest.fixture
def params_with(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    params = read_params()

    def build(**settings):
        return params.model_copy(update={"quantization": changed(QUANTIZATION, **settings)})

    return build


def gpus(*sizes):
    return [Gpu("some GPU", "580", size, 9.0) for size in sizes]


def test_layers_wait_in_host_memory_if_the_model_is_too_large(params_with):
    assert streams_layers(params_with(), SHAPE, gpus(6))
    assert not streams_layers(params_with(), SHAPE, gpus(24))
    assert streams_layers(params_with(), SHAPE, gpus(24, 6))
    assert streams_layers(params_with(placement="host"), SHAPE, gpus(80))
    assert not streams_layers(params_with(placement="gpu"), SHAPE, gpus(6))
    assert not streams_layers(params_with(bits=8), SHAPE, gpus(6))
    assert not streams_layers(params_with(), OTHER_FAMILY, gpus(6))
    assert placement(params_with(), SHAPE, gpus(24)) is None


def test_the_needs_of_streamed_layers(params_with):
    """6.98 billion weights in 4.127 bits are 3.35 GiB; embeddings and head are 1.96 GiB, two layers 0.21 GiB."""
    fits = placement(params_with(), SHAPE, gpus(6))
    assert fits.level == "ok"
    assert (
        "3.4 GiB there (pinned), 2.2 GiB and the activations on the GPU; the copies of a micro-batch take about 0.15 s"
        in fits.text
    )

    too_small = placement(params_with(), SHAPE, gpus(3))
    assert too_small.level == "problem"
    assert "The budget is 2.0 GiB. Use a smaller base model." in too_small.text


@pytest.mark.parametrize(
    ("settings", "shape", "gib", "words"),
    [
        (
            {},
            OTHER_FAMILY,
            6,
            ["needs 5.3 GiB", "budget is 5.0 GiB", "its layers cannot be in host memory", "smaller base model"],
        ),
        ({"placement": "host"}, OTHER_FAMILY, 80, ["'host'", "its layers cannot be in host memory", "Use 'auto'"]),
        ({"placement": "host", "bits": 8}, SHAPE, 80, ["'host'", "quantization.bits 4", "Use 'auto'"]),
        ({"placement": "gpu"}, SHAPE, 6, ["needs 5.3 GiB", "Use quantization.placement auto"]),
        ({"bits": 16}, SHAPE, 12, ["needs 15.0 GiB", "fewer bits"]),
    ],
)
def test_a_model_that_cannot_run_is_a_problem(params_with, settings, shape, gib, words):
    finding = placement(params_with(**settings), shape, gpus(gib))

    assert finding is not None
    assert finding.level == "problem"
    for word in words:
        assert word in finding.text
