import csv
import json
import logging
import math
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from pdf2lora.training.trainer import build_model, build_trainer
from ruamel.yaml import YAML
from tiny_llama import BOS, COMPUTE, LORA, QUANTIZATION, TRAIN, changed, quiet, random_sequences, write_tiny_llama
from transformers import LlamaConfig

from pdf2lora.tokens import windows
from pdf2lora.training import tracking
from pdf2lora.training.throughput import flop_per_token
from pdf2lora.training.tracking import DvcliveCallback, log_to_file

pytestmark = quiet
LOOKS = windows(0, np.arange(50), bos=BOS, seq_length=32, stride=32)
CURVES = {f"{side}/{name}" for side in ("train", "validation") for name in ("loss", "perplexity")}
CURVES |= {"learning_rate", "gradient_norm"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    return tmp_path


@pytest.fixture
def build(base, project):
    """A trainer of 4 steps that writes to a folder of this name, with checkpoints beside it."""

    def build(name, **changes):
        train = changed(TRAIN, **changes)
        return build_trainer(
            build_model(base, QUANTIZATION, LORA, COMPUTE, seed=train.seed),
            random_sequences(8),
            train=train,
            compute=COMPUTE,
            kernels="reference",
            gradient_checkpointing="full",
            per_device_batch=2,
            gradient_accumulation_steps=1,
            checkpoints=project / f"{name}-checkpoints",
            validation_windows=LOOKS,
            callbacks=[DvcliveCallback(project / name, tokens_per_step=2 * 32)],
        )

    return build


def curves(folder):
    """Name of each curve -> its (step, value) in the order of the file."""
    found = {}
    for file in (folder / "plots/metrics").rglob("*.tsv"):
        name = str(file.relative_to(folder / "plots/metrics").with_suffix(""))
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        found[name] = [(int(row["step"]), float(row[name.rpartition("/")[2]])) for row in rows]
    return found


# DvcliveCallback


def test_curves_hold_what_the_trainer_logged(build, project):
    trainer = build("train")
    trainer.train()

    found = curves(project / "train")
    assert found.keys() == CURVES | ({"gpu_memory_gib"} if torch.cuda.is_available() else set())
    for name, ours in {"loss": "train/loss", "eval_loss": "validation/loss", "grad_norm": "gradient_norm"}.items():
        history = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        assert found[ours] == pytest.approx(np.array(history), rel=1e-9)
    assert [step for step, _ in found["learning_rate"]] == [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["validation/loss"]] == [0, 2, 4]
    for side in ("train", "validation"):
        for (_, loss), (_, perplexity) in zip(found[f"{side}/loss"], found[f"{side}/perplexity"], strict=True):
            assert perplexity == pytest.approx(math.exp(loss), rel=1e-9)


def test_dvc_yaml_draws_every_curve_that_each_machine_has():
    pipeline = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))
    drawn = [Path(file) for entry in pipeline["plots"] for plot in entry.values() for file in plot["y"]]
    folder = Path("metrics/train/plots/metrics")

    of_train = [file.relative_to(folder) for file in drawn if file.is_relative_to(folder)]
    assert {str(file.with_suffix("")) for file in of_train} == CURVES


def test_summary_holds_the_last_values(build, project):
    build("train").train()

    summary = json.loads((project / "train/metrics.json").read_text())
    found = curves(project / "train")
    assert summary["step"] == 4
    assert summary["train"]["loss"] == found["train/loss"][-1][1]
    assert summary["validation"]["perplexity"] == found["validation/perplexity"][-1][1]


def test_nothing_is_written_outside_the_folder(build, project):
    build("train").train()

    assert {path.name for path in project.iterdir()} == {"dvc.yaml", "train", "train-checkpoints"}
    assert (project / "dvc.yaml").read_text() == "stages: {}\n"
    assert {path.name for path in (project / "train").iterdir()} == {"metrics.json", "plots"}


def test_resumed_training_has_the_curves_of_a_whole_one(build, project):
    build("whole").train()
    shutil.copytree(project / "whole-checkpoints/checkpoint-2", project / "resumed-checkpoints/checkpoint-2")

    resumed = build("resumed")
    resumed.args.eval_on_start = False  # as in the train stage: the history of the checkpoint holds it
    resumed.train(resume_from_checkpoint=str(project / "resumed-checkpoints/checkpoint-2"))

    assert curves(project / "resumed") == curves(project / "whole")
    assert (project / "resumed/metrics.json").read_text() == (project / "whole/metrics.json").read_text()


def test_each_step_is_a_line_of_the_log(build, caplog):
    caplog.set_level(logging.INFO, logger="train")

    build("train", num_train_epochs=0.5).train()

    lines = [message for message in caplog.messages if message.startswith("step ")]
    begins = ["step 0 {'eval_loss':", "step 1 {'loss':", "step 2 {'loss':", "step 2 {'eval_loss':", "step 2 {}"]
    assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=True)] == begins


def test_throughput_is_that_of_the_median_step(project, monkeypatch):
    monkeypatch.setattr(tracking, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    tracker = DvcliveCallback(project / "train", tokens_per_step=30_000)
    tracker.step_starts = [0.0, 50.0, 51.5, 60.0, 61.5, 63.0]  # compiles in the first, looks at documents in the third
    config = LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                         num_key_value_heads=8, head_dim=128, vocab_size=128256)  # fmt: skip

    numbers = tracker.throughput(config, 512)

    assert numbers["step_tokens_per_s"] == 20_000
    assert numbers["model_flops_utilization"] == pytest.approx(20_000 * flop_per_token(config, 512) / 989e12, abs=5e-4)
    monkeypatch.setattr(tracking, "device_name", lambda: "cpu")
    assert tracker.throughput(config, 512)["model_flops_utilization"] is None


def test_throughput_of_a_training_on_the_way(build, project):
    trainer = build("train")
    (tracker,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, DvcliveCallback)]
    assert "step_tokens_per_s" not in tracker.throughput(trainer.model.config, 32)
    began = time.time() - 100
    assert tracker.start_up(began) == {}

    trainer.train()

    assert len(tracker.step_starts) == 4
    assert 100 <= tracker.start_up(began)["seconds_to_first_step"] <= time.time() - began + 0.1
    assert tracker.throughput(trainer.model.config, 32)["step_tokens_per_s"] > 0


@pytest.mark.parametrize("step_starts", [[], [0.0], [0.0, 1.0]])
def test_training_too_short_for_a_throughput_has_none(project, step_starts):
    tracker = DvcliveCallback(project / "train", tokens_per_step=64)
    tracker.step_starts = step_starts

    assert not {"step_tokens_per_s", "model_flops_utilization"} & tracker.throughput(LlamaConfig(), 32).keys()


def test_accumulated_batches_are_one_step_of_the_throughput(build, project):
    trainer = build("train")
    trainer.args.gradient_accumulation_steps = 2
    (tracker,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, DvcliveCallback)]

    trainer.train()

    assert len(tracker.step_starts) == trainer.state.global_step == 2


# log_to_file


@pytest.mark.usefixtures("own_logging")
@pytest.mark.filterwarnings("default")
def test_log_and_warnings_go_to_a_file(tmp_path):
    file = log_to_file(tmp_path / "logs")
    logging.getLogger("train").info("step %d", 1)
    logging.getLogger("train").debug("a detail")
    warnings.warn("the sea rises", UserWarning, stacklevel=1)

    assert file.parent == tmp_path / "logs"
    assert re.fullmatch(r"training_\d{8}_\d{6}\.log", file.name)
    text = file.read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO train: step 1$", text, re.MULTILINE)
    assert re.search(r"WARNING py\.warnings: .*UserWarning: the sea rises", text)
    assert "a detail" not in text
