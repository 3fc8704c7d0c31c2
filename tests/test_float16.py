"""Training in float16, the data type of GPUs without bfloat16, on a CPU: scaled loss, skipped steps, resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import TRAIN, changed, quiet, random_sequences, same, trainable
from tiny_training import NO_DROPOUT, build_learner, run_training

from pdf2lora.errors import InputError
from pdf2lora.training.loop import Learner

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")]  # the first step is skipped
GradScaler = torch.amp.GradScaler
ROWS = np.arange(2)
HUGE = 2.0**40  # overflows float16 in each backward pass


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows float16 on a CPU. The settings refuse it there, because it is slow."""
    monkeypatch.setattr("pdf2lora.model.loading.compute_dtype", lambda compute: torch.float16)


def with_scale(learner: Learner, scale: float) -> Learner:
    learner.scaler = GradScaler("cpu", init_scale=scale, growth_interval=3)
    learner.scaler.scale(torch.zeros(()))
    return learner


@pytest.mark.parametrize("bits", [4, 16])
def test_trains_as_in_float32(base: Path, tmp_path: Path, float16: None, monkeypatch: pytest.MonkeyPatch, bits: int):
    trained = run_training(base, tmp_path / "float16", bits=bits, lora=NO_DROPOUT)
    assert trained.learner.forward.head.dtype == torch.float16
    assert trained.learner.scaler.is_enabled()
    monkeypatch.undo()
    exact = run_training(base, tmp_path / "float32", bits=bits, lora=NO_DROPOUT)

    assert not exact.learner.scaler.is_enabled()
    for name in ("train/loss", "validation/loss"):
        assert trained.values(name) == pytest.approx(exact.values(name), rel=2e-3)
    assert trained.values("gradient_norm") == pytest.approx(exact.values("gradient_norm"), rel=0.02)


def test_a_step_whose_gradients_overflow_changes_nothing_and_halves_the_scale(base: Path, float16: None):
    learner = with_scale(build_learner(base), HUGE)
    before = trainable(learner.model)

    learner.step(random_sequences(2), ROWS, 0)

    assert same(trainable(learner.model), before)
    assert learner.scaler.get_scale() == HUGE / 2
    assert float(learner.parameters.loss) == pytest.approx(5.6, abs=0.5)  # the loss itself is correct

    with_scale(learner, 1024.0).step(random_sequences(2), ROWS, 1)
    assert not same(trainable(learner.model), before)


def test_gradients_that_always_overflow_are_an_error(base: Path, float16: None):
    learner = with_scale(build_learner(base), 2.0**-11)

    with pytest.raises(InputError, match="the gradients overflow in float16 at any loss scale"):
        learner.step(random_sequences(2), ROWS, 0)


def test_a_training_in_bfloat16_continues_in_float16(base: Path, float16: None):
    """On another GPU, which has no bfloat16."""
    learner = build_learner(base)
    learner.load_state(learner.state() | {"scaler": {}})

    assert learner.scaler.is_enabled()


def test_resume_continues_with_the_scale(base: Path, tmp_path: Path, float16: None, monkeypatch: pytest.MonkeyPatch):
    """Of the eight steps some are skipped; the scale grows and shrinks."""
    monkeypatch.setattr(
        "torch.amp.GradScaler", lambda *_, enabled: GradScaler("cpu", init_scale=2.0**19, growth_interval=2)
    )
    long = changed(TRAIN, num_train_epochs=2)
    whole = run_training(base, tmp_path / "whole", train_settings=long)

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(base, tmp_path / "resumed", train_settings=long, before_step=stop)
    resumed = run_training(base, tmp_path / "resumed", train_settings=long)

    assert resumed.result.first_step == 4
    assert resumed.learner.scaler.state_dict() == whole.learner.scaler.state_dict()
    assert same(resumed.adapter, whole.adapter)
    assert resumed.values("train/loss") == whole.values("train/loss")
    norms = np.array(whole.values("gradient_norm"))
    assert 2 < np.isfinite(norms).sum() < len(norms)


@pytest.mark.parametrize("has_validation", [True, False])
def test_a_loss_that_is_not_finite_is_an_error(
    base: Path, tmp_path: Path, float16: None, monkeypatch: pytest.MonkeyPatch, has_validation: bool
):
    """Activations beyond 65,504, as in Gemma's layers, become infinite in float16."""
    learner_of = build_learner

    def build(*arguments: object, **settings: object) -> Learner:
        learner = learner_of(*arguments, **settings)
        learner.model.get_base_model().model.layers[0].post_attention_layernorm.weight.data.fill_(60_000)
        return learner

    monkeypatch.setattr("tiny_training.build_learner", build)
    windows = {} if has_validation else {"validation_windows": ()}

    with pytest.raises(InputError, match=r"compute\.compute_dtype=float32"):
        run_training(base, tmp_path, **windows)
