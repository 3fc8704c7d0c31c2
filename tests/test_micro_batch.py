"""Forward and backward pass of a micro-batch on a CPU; tests/test_gpu.py has those of a CUDA graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import quiet, random_sequences, tensors_of
from tiny_training import NO_DROPOUT, build_learner

from pdf2lora.model.device import device
from pdf2lora.tokens import IGNORED, Sequences
from pdf2lora.training import micro_batch
from pdf2lora.training.loop import Learner

pytestmark = quiet


@pytest.fixture(scope="module")
def learner(base: Path) -> Learner:
    """A learner whose B is not zero, so that the adapter changes the output."""
    learner = build_learner(base, lora=NO_DROPOUT, per_device_batch=4)
    torch.manual_seed(0)
    with torch.no_grad():
        learner.parameters.parameter.normal_(std=0.05)
    return learner


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    """4 sequences; the last one has 7 targets."""
    return Sequences(random_sequences(4).stream[: 3 * 32 + 7 + 1], 32)


def accumulate(learner: Learner, sequences: Sequences, parts: list[list[int]], *, scale: float) -> torch.Tensor:
    """The flat buffer after these micro-batches."""
    learner.parameters.buffer.zero_()
    for indices in parts:
        inputs, targets = map(torch.from_numpy, sequences.batch(np.array(indices)))
        learner.micro_batch(inputs, targets, scale=scale, seed=1, first_sequence=indices[0])
    return learner.parameters.buffer.clone()


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]])
def test_accumulation_equals_one_large_batch(learner: Learner, sequences: Sequences, parts: list[list[int]]) -> None:
    scale = 1 / sequences.num_targets(np.arange(4))

    large = accumulate(learner, sequences, [[0, 1, 2, 3]], scale=scale)
    accumulated = accumulate(learner, sequences, parts, scale=scale)

    assert large[:-2].norm() > 0.01
    torch.testing.assert_close(accumulated, large, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_equal_those_of_whole_logits(learner: Learner, sequences: Sequences) -> None:
    """Each target has the same weight: the loss is not the mean of the sequences' means."""
    buffer = accumulate(learner, sequences, [[0, 1], [2, 3]], scale=1 / (3 * 32 + 7))

    inputs, targets = (tensor.to(device()) for tensor in tensors_of(sequences))
    learner.parameters.buffer.zero_()
    logits = learner.model(input_ids=inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()

    assert buffer[-2].item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(buffer[:-2], learner.parameters.gradient, rtol=1e-4, atol=1e-6)


def test_scale_multiplies_loss_and_gradient(learner: Learner, sequences: Sequences) -> None:
    once, thrice = (accumulate(learner, sequences, [[0]], scale=scale) for scale in (0.01, 0.03))

    assert once[-2] > 0
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize(
    ("has_gpu", "kernels", "gradient_checkpointing", "obstacle"),
    [
        (False, "reference", "none", "GPU"),
        (False, "fused", "none", "GPU"),
        (True, "reference", "full", "reference kernels"),
        (True, "fused", "offload", "host memory"),
        (True, "fp8", "offload", "host memory"),
        (True, "fused", "none", None),
        (True, "fused", "full", None),
        (True, "fp8", "mlp", None),
    ],
)
def test_a_graph_is_possible_on_a_gpu_without_the_reference_and_offload(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, kernels: str, gradient_checkpointing: str, obstacle: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    text = micro_batch.graph_obstacle(kernels, gradient_checkpointing)

    assert text == "" if obstacle is None else obstacle in text
