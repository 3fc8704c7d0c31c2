"""Curves of dvclive, the log file, and accelerate's trackers."""

import csv
import json
import logging
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import run_forked
from helpers import REPOSITORY
from ruamel.yaml import YAML
from tiny_llama import TRAIN, changed, quiet
from tiny_training import run_training

from pdf2lora.errors import InputError
from pdf2lora.evaluation.rounding import rounded
from pdf2lora.params import read_params
from pdf2lora.runtime.distributed import Processes
from pdf2lora.training.tracking import Tracker, Trackers, log_to_file, require_trackers

pytestmark = quiet
Curves = dict[str, list[tuple[int, float]]]
CURVES = {f"{split}/{name}" for split in ("train", "validation") for name in ("loss", "perplexity")}
CURVES |= {"learning_rate", "gradient_norm"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(base: Path, project: Path) -> Callable[..., Any]:
    """A training of 4 steps that writes to a folder of this name, and its checkpoints."""

    def run(name: str, trackers: Any = None, **changes: Any) -> Any:
        tracker = Tracker(project / name, Processes(), trackers, tokens_per_step=2 * 32)
        training = run_training(
            base, project / f"{name}-checkpoints", train_settings=changed(TRAIN, **changes), tracker=tracker
        )
        return training, tracker

    return run


def curves_in(folder: Path) -> Curves:
    """Name of each curve -> its (step, value) in the order of the file."""
    curves = {}
    for file in (folder / "plots/metrics").rglob("*.tsv"):
        name = str(file.relative_to(folder / "plots/metrics").with_suffix(""))
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        curves[name] = [(int(row["step"]), float(row[name.rpartition("/")[2]])) for row in rows]
    return curves


# Tracker


def test_curves_have_every_log_entry(run: Any, project: Path) -> None:
    run("train")

    curves = curves_in(project / "train")
    assert curves.keys() == CURVES | ({"gpu_memory_gib"} if torch.cuda.is_available() else set())
    assert [step for step, _ in curves["learning_rate"]] == [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["validation/loss"]] == [0, 2, 4]
    for split in ("train", "validation"):
        for (_, loss), (_, perplexity) in zip(curves[f"{split}/loss"], curves[f"{split}/perplexity"], strict=True):
            assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_curves_have_the_values_of_the_loop(base: Path, run: Any, project: Path, tmp_path: Path) -> None:
    run("train")

    history = run_training(base, tmp_path / "other").history
    curves = curves_in(project / "train")
    for name in CURVES & {"train/loss", "validation/loss", "learning_rate", "gradient_norm"}:
        assert curves[name] == [(entry["step"], rounded(entry[name])) for entry in history if name in entry]


def test_dvc_yaml_plots_the_curves_that_each_machine_has() -> None:
    pipeline = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))
    plotted = [Path(file) for entry in pipeline["plots"] for plot in entry.values() for file in plot["y"]]
    folder = Path("metrics/train/plots/metrics")

    of_train = [file.relative_to(folder) for file in plotted if file.is_relative_to(folder)]
    assert {str(file.with_suffix("")) for file in of_train} == CURVES


def test_the_summary_has_the_last_values(run: Any, project: Path) -> None:
    run("train")

    summary = json.loads((project / "train/metrics.json").read_text())
    curves = curves_in(project / "train")
    assert summary["step"] == 4
    assert summary["train"]["loss"] == curves["train/loss"][-1][1]
    assert summary["validation"]["perplexity"] == curves["validation/perplexity"][-1][1]


def test_nothing_is_written_outside_the_folder(run: Any, project: Path) -> None:
    run("train")

    assert {path.name for path in project.iterdir()} == {"dvc.yaml", "train", "train-checkpoints"}
    assert (project / "dvc.yaml").read_text() == "stages: {}\n"
    assert {path.name for path in (project / "train").iterdir()} == {"metrics.json", "plots"}


def test_a_resumed_training_has_the_files_of_a_complete_one(run: Any, project: Path) -> None:
    """DVC removes the outputs of a stage before it runs again, so the folder is empty at the start."""
    run("complete")
    shutil.copytree(project / "complete-checkpoints/checkpoint-2", project / "resumed-checkpoints/checkpoint-2")

    training, _ = run("resumed")

    assert training.result.first_step == 2
    files = [file.relative_to(project / "complete") for file in (project / "complete").rglob("*") if file.is_file()]
    assert len(files) == 1 + len(CURVES) + torch.cuda.is_available()
    for file in files:
        assert (project / "resumed" / file).read_bytes() == (project / "complete" / file).read_bytes(), file


def test_each_log_entry_is_a_line_of_the_log(run: Any, log: list[str]) -> None:
    run("train", num_train_epochs=0.5)

    lines = [message for message in log if message.startswith("step ")]
    starts = ["step 0 {'validation/loss':", "step 1 {'train/loss':", "step 2 {'train/loss':"]
    starts.append("step 2 {'validation/loss':")
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_other_processes_write_nothing(project: Path) -> None:
    def work(processes: Processes) -> bool:
        tracker = Tracker(project / str(processes.index), processes, None, tokens_per_step=1)
        tracker.start([{"step": 0, "validation/loss": 1.0}], 0, 2)
        tracker.log([], {"step": 1, "train/loss": 1.0})
        tracker.end_step()
        tracker.end()
        return processes.is_main

    assert run_forked(2, work) == [True, False]
    assert (project / "0/metrics.json").exists()
    assert not (project / "1").exists()


@pytest.mark.parametrize("planned_steps", [9, None])
@pytest.mark.parametrize("kept_step", [2, None])
def test_the_kept_step_and_the_planned_steps_are_in_the_metrics(
    project: Path, kept_step: int | None, planned_steps: int | None
) -> None:
    tracker = Tracker(project / "train", Processes.alone(torch.device("cpu")), None, tokens_per_step=1)
    tracker.start([], 0, 4)
    tracker.log([], {"step": 4, "validation/loss": 1.0})
    tracker.end(kept_step, planned_steps=planned_steps)

    metrics = json.loads((project / "train/metrics.json").read_text())
    assert metrics.get("kept_step") == kept_step
    assert metrics.get("planned_steps") == planned_steps


def test_the_perplexity_of_a_very_large_loss_is_infinite(project: Path) -> None:
    tracker = Tracker(project / "train", Processes.alone(torch.device("cpu")), None, tokens_per_step=1)
    tracker.start([], 0, 4)
    tracker.log([], {"step": 1, "train/loss": 710.0})
    tracker.end()

    assert curves_in(project / "train")["train/perplexity"] == [(1, math.inf)]


def test_the_median_step_leaves_out_the_first(project: Path) -> None:
    tracker = Tracker(project / "train", Processes(), None, tokens_per_step=30_000)

    tracker.step_starts = [0.0, 50.0, 51.5, 60.0, 61.5, 63.0]  # the first compiles kernels, the third validates

    assert tracker.median_step_s == 1.5


@pytest.mark.parametrize("step_starts", [[], [0.0], [0.0, 1.0]])
def test_a_training_too_short_for_a_median_has_none(project: Path, step_starts: list[float]) -> None:
    tracker = Tracker(project / "train", Processes(), None, tokens_per_step=64)

    tracker.step_starts = step_starts

    assert tracker.median_step_s is None


def test_steps_are_timed(run: Any) -> None:
    before = time.time()

    _, tracker = run("train")

    assert len(tracker.step_starts) == 4
    assert before < tracker.first_step_at < time.time()
    assert 0 < tracker.seconds < time.time() - before
    assert 0 < tracker.median_step_s < tracker.seconds


# Trackers


@pytest.fixture
def new_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_missing_package_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = "pdf2lora.training.tracking.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None if name == "mlflow" else SimpleNamespace(origin="file"))

    require_trackers([])
    require_trackers(["wandb"])
    with pytest.raises(InputError) as caught:
        require_trackers(["wandb", "mlflow"])

    assert "\n" not in str(caught.value)
    for words in ("train.report_to", "'mlflow'", "pip install mlflow"):
        assert words in str(caught.value)


def test_a_folder_with_the_name_of_a_package_is_not_the_package(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers leave such folders in a project."""
    (project / "trackio").mkdir()
    monkeypatch.syspath_prepend(str(project))

    with pytest.raises(InputError, match="pip install trackio"):
        require_trackers(["trackio"])


@pytest.mark.usefixtures("new_accelerator")
def test_two_trackers_at_once(run: Any, project: Path, monkeypatch: pytest.MonkeyPatch, write_params: Any) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        (project / name).mkdir()
        monkeypatch.setenv(name, str(project / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("DVC_EXP_NAME", "gyral-taco")
    write_params({"lora.r": 5})

    run("train", Trackers(read_params(), ["wandb", "tensorboard"]))

    (file,) = project.glob("WANDB_DIR/wandb/offline-run-*/run-*.wandb")
    texts = (b"pdf2lora", b"gyral-taco", b"lora.r", b"train/loss", b"validation/loss", b"gradient_norm")
    until = time.monotonic() + 20
    while (missing := [text for text in texts if text not in file.read_bytes()]) and time.monotonic() < until:
        time.sleep(0.1)  # another process writes the file
    assert not missing
    assert not (project / "wandb").exists()
    (folder,) = {file.parent for file in project.glob("logs/* gyral-taco/pdf2lora/events.out.tfevents.*")}
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    curve = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    expected = curves_in(project / "train")["train/loss"]
    assert [step for step, _ in curve] == [step for step, _ in expected]
    assert [value for _, value in curve] == pytest.approx([value for _, value in expected], rel=1e-5)


@pytest.mark.usefixtures("new_accelerator")
@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_training(
    run: Any,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_params: Any,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    pytest.importorskip("tensorboard")

    def fail(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("connection\nrefused")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", fail)
    write_params()

    run("train", Trackers(read_params(), ["tensorboard"]))

    warning = "train: warning: tensorboard failed (connection refused) and gets no more entries"
    assert capsys.readouterr().out.splitlines().count(warning) == 1
    assert curves_in(project / "train")["train/loss"]


def test_the_end_of_the_trackers_leaves_the_process_group(project: Path, write_params: Any) -> None:
    """The processes still gather numbers after that."""
    write_params()

    def work(processes: Processes) -> list[int]:
        if processes.is_main:
            Trackers(read_params(), []).end()
        return processes.gather(processes.index)

    assert run_forked(2, work) == [[0, 1], [0, 1]]


@pytest.mark.usefixtures("new_accelerator")
def test_a_tracker_that_cannot_start_is_reported_in_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, write_params: Any
) -> None:
    def refuse(self: Any, *arguments: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    write_params()

    with pytest.raises(InputError) as caught:
        Trackers(read_params(), ["wandb"])

    assert "\n" not in str(caught.value)
    for words in ("train.report_to: wandb", "no route to host", "wandb login"):
        assert words in str(caught.value)


# log_to_file


@pytest.mark.usefixtures("own_logging")
@pytest.mark.filterwarnings("default")
def test_log_and_warnings_go_to_a_file(tmp_path: Path) -> None:
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
