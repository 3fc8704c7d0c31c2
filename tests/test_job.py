"""The stage train on a tiny project, each time in new processes."""

import csv
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import dvclive.live  # noqa: F401  # train imports it; forks of this process need not
import pytest
import torch
from forked import run_forked
from helpers import REPOSITORY, prose
from safetensors.torch import load_file
from tiny_llama import COMPUTE, LORA, QUANTIZATION, TINY_SETTINGS, changed, quiet, same, write_split

from pdf2lora.evaluation.scoring import nats_per_token
from pdf2lora.model.forward import build_forward
from pdf2lora.model.initialization import restore_trained_base
from pdf2lora.model.kernels.offload import HostOutOfMemory
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import read_params
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.monitor import device_name
from pdf2lora.token_files import TokenFile
from pdf2lora.training import job, loop
from pdf2lora.training.checkpoints import save_checkpoint
from stages import train

pytestmark = [
    quiet,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot be forked"),
]
TEXTS = {"train": [prose(seed, 20) for seed in range(3)], "validation": [prose(10, 12)], "test": []}
SETTINGS: dict[str, Any] = {
    **TINY_SETTINGS,
    "train.save_steps": 3,
    "evaluate.stride": 12,
}
NUM_SEQUENCES = math.ceil((sum(len(text) + 2 for text in TEXTS["train"]) - 1) / 32)
NUM_STEPS = math.ceil(NUM_SEQUENCES / 2)
BATCH: dict[str, Any] = {
    "device": "cpu",
    "num_processes": 1,
    "memory_gib": "auto",
    "placement": "gpu",
    "gradient_checkpointing": "full",
    "per_device_batch": 2,
    "gradient_accumulation_steps": 1,
    "effective_batch": 2,
}


class Outcome(NamedTuple):
    """exit: the argument of sys.exit, None at a normal end."""

    exit: Any
    stdout: str


def run(count: int = 1, prepare: Callable[[], object] = lambda: None) -> list[Outcome]:
    """Runs the stage in `count` processes of one job, as a launcher does. Each process calls `prepare` first."""

    def work(processes: Any) -> Outcome:
        logging.basicConfig = partial(logging.basicConfig, force=True)  # pytest has handlers
        printed, status = io.StringIO(), None
        with redirect_stdout(printed), redirect_stderr(io.StringIO()):
            try:
                prepare()
                train.main()
            except SystemExit as ended:
                status = ended.code
        return Outcome(status, printed.getvalue())

    return run_forked(count, work, timeout_s=100)


def run_one(prepare: Callable[[], object] = lambda: None) -> Outcome:
    (outcome,) = run(1, prepare)
    return outcome


@pytest.fixture
def project(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, write_params: Any) -> Any:
    """A project after find_batch; `configure` writes its params.yaml with changes."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_STAGE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for split, texts in TEXTS.items():
        write_split(tmp_path, split, texts, base)
    write_split(tmp_path, "replay", [], base)
    shutil.copytree(base, tmp_path / "models/base")
    (tmp_path / "metrics").mkdir()

    def configure(changes: dict[str, Any] | None = None, batch: dict[str, Any] | None = None) -> None:
        write_params(SETTINGS | (changes or {}))
        (tmp_path / "metrics/batch.json").write_text(json.dumps(BATCH | (batch or {})))

    configure()
    return SimpleNamespace(folder=tmp_path, configure=configure)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of an undisturbed training. The first test that needs them writes them."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def trained(project: Any, outputs: Path) -> Any:
    """The project after train; `printed` is the last line of the stage."""
    if not any(outputs.iterdir()):
        outcome = run_one()
        assert outcome.exit is None
        (project.folder / "printed").write_text(outcome.stdout)
        shutil.copytree(project.folder, outputs, dirs_exist_ok=True)
    shutil.copytree(outputs, project.folder, dirs_exist_ok=True)
    return project


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "models/adapter/adapter_model.safetensors"))


def log_of(folder: Path) -> str:
    (file,) = (folder / "logs").glob("training_*.log")
    return file.read_text()


def read(file: str) -> dict[str, Any]:
    return dict(json.loads(Path(file).read_text()))


def checkpoints() -> set[str]:
    return {folder.name for folder in Path(".scratch/train").glob("*/checkpoint-*")}


# Outputs


@pytest.mark.usefixtures("trained")
def test_the_adapter_loads() -> None:
    model = load_adapter(load_base(Path("models/base"), QUANTIZATION, COMPUTE), Path("models/adapter"))

    settings = model.peft_config["default"]
    assert (settings.r, settings.base_model_name_or_path) == (LORA.r, "models/base")
    saved = adapter_in(Path())
    assert len(saved) == 2 * 4 * 2
    assert all(value.any() and value.dtype == torch.float32 for value in saved.values())


@pytest.mark.usefixtures("trained")
def test_the_adapter_has_settings_and_weights_and_no_empty_card() -> None:
    assert sorted(os.listdir("models/adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    targets = read("models/adapter/adapter_config.json")["target_modules"]
    assert targets == sorted(LORA.target_modules)


def test_metrics_log_and_curves_are_written(trained: Any) -> None:
    metrics = read("metrics/train/metrics.json")
    assert metrics["step"] == NUM_STEPS
    assert metrics["train"]["perplexity"] == pytest.approx(math.exp(metrics["train"]["loss"]), rel=1e-4)
    assert metrics["validation"]["loss"] < math.log(260)
    machine = read("metrics/machine.json")["train"]
    assert (machine["num_processes"], machine["steps"]) == (1, NUM_STEPS)
    assert (machine["attention"], machine["kernels"]) == ("sdpa", "reference")
    for name in ("tokens_per_s", "step_tokens_per_s", "seconds_to_first_step"):
        assert machine[name] > 0, name
    assert "peak_allocated_gib" not in machine
    log = log_of(trained.folder)
    for line in ('settings: {"corpus":', "processes: 1", "CUDA graph: no", f"step {NUM_STEPS} {{'train/loss':"):
        assert line in log
    assert re.fullmatch(
        rf"train: {NUM_STEPS} steps, [\d,]+ tokens/s; log in logs/training_\d{{8}}_\d{{6}}\.log\n",
        Path("printed").read_text(),
    )


@pytest.mark.usefixtures("trained")
def test_every_token_counts_in_the_throughput() -> None:
    with Path("metrics/train/plots/metrics/train/loss.tsv").open() as lines:
        assert [int(row["step"]) for row in csv.DictReader(lines, delimiter="\t")] == list(range(1, NUM_STEPS + 1))


@pytest.mark.usefixtures("trained")
def test_the_checkpoints_are_removed_and_a_forced_run_trains_again() -> None:
    assert {path.name for path in Path(".scratch/train").glob("*/*")} == {"lock"}
    expected = Path("models/adapter/adapter_model.safetensors").read_bytes()

    assert run_one().exit is None

    assert read("metrics/machine.json")["train"]["steps"] == NUM_STEPS
    assert Path("models/adapter/adapter_model.safetensors").read_bytes() == expected


@pytest.mark.usefixtures("project")
def test_a_training_without_validation_documents() -> None:
    write_split(Path(), "validation", [], Path("models/base"))

    assert run_one().exit is None

    assert "validation" not in read("metrics/train/metrics.json")


def test_the_log_of_a_temporary_copy_is_in_the_project(
    project: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC removes the copy after `dvc exp run --temp`."""
    root = tmp_path_factory.mktemp("root")
    project.configure({"train.num_train_epochs": 0.2})
    monkeypatch.setenv("DVC_ROOT", str(root))

    outcome = run_one()

    log = re.fullmatch(r"train: \d steps, [\d,]+ tokens/s; log in (logs/.+)\n", outcome.stdout)
    assert log
    assert (root / log[1]).exists()
    assert not Path("logs").exists()


@pytest.mark.parametrize(("memory_gib", "limits"), [("auto", []), (20.5, [20.5])])
def test_the_memory_limit_of_find_batch_is_kept(
    project: Any, monkeypatch: pytest.MonkeyPatch, memory_gib: Any, limits: list[float]
) -> None:
    project.configure(batch={"memory_gib": memory_gib})
    received: list[float] = []
    monkeypatch.setattr(job, "limit_gpu_memory", received.append)
    monkeypatch.setattr(job, "build_model", lambda *arguments: sys.exit(f"limits: {received}"))

    assert run_one().exit == f"limits: {limits}"


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compute.seq_length": 129}, ["compute.seq_length", "129", "128"]),
        ({"train.report_to": ["mlflow", "aim"]}, ["train.report_to", "mlflow", "pip install"]),
    ],
)
def test_settings_that_cannot_run_are_one_line(
    project: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr("pdf2lora.training.tracking.importlib.util.find_spec", lambda name: None)
    project.configure(changes)

    message = run_one().exit

    assert message.startswith("error: ")
    assert "\n" not in message
    assert all(word in message for word in words)
    assert not Path("models/adapter").exists()


@pytest.mark.usefixtures("project")
def test_a_damaged_base_model_is_reported_in_one_line() -> None:
    with Path("models/base/config.json").open("a") as file:
        file.write(" ")

    message = run_one().exit

    assert message.startswith("error: models/base")
    assert "dvc repro --force convert" in message


GPU_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")
HOST_ERROR = HostOutOfMemory("offload needs 0.25 GiB more for one layer, and 2.1 GiB are available")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("error", "step", "words"),
    [
        (GPU_ERROR, None, "the GPU ran out of memory (CUDA out of memory). Free it (nvidia-smi"),
        (GPU_ERROR, 2, "the GPU ran out of memory (CUDA out of memory). Free it (nvidia-smi"),
        (HOST_ERROR, None, f"the host ran out of memory ({HOST_ERROR}). Free it (top"),
    ],
)
def test_lack_of_memory_is_reported_in_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, error: torch.OutOfMemoryError, step: int | None, words: str
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(job, "train", fail)
    if step:
        key = fingerprint_now()
        save_checkpoint(Path(".scratch/train") / key, step, {})

    message = run_one().exit

    assert "\n" not in message
    assert f"error: train: {words}" in message
    assert "find_batch" in message
    assert ("the checkpoint of step 2" if step else "the base model") in message
    assert not Path("models/adapter").exists()
    if step:
        assert "the GPU of process 1 of 2 ran out of memory" in run(2)[1].exit


def test_trackers_and_the_distance_of_checkpoints_do_not_change_the_fingerprint(project: Any) -> None:
    keys = set()
    for changes in ({}, {"train.report_to": ["wandb"]}, {"train.save_steps": 7}):
        project.configure(changes)
        keys.add(fingerprint_now())
    project.configure({"train.logging_steps": 7})
    assert len(keys) == 1
    assert fingerprint_now() not in keys


@pytest.mark.parametrize("is_same", [True, False])
def test_a_batch_of_another_device_is_reported(project: Any, monkeypatch: pytest.MonkeyPatch, is_same: bool) -> None:
    project.configure(batch={"device": device_name() if is_same else "NVIDIA A100-SXM4-80GB"})
    monkeypatch.setattr(job, "build_model", lambda *arguments: sys.exit("loads the model"))

    outcome = run_one()

    assert outcome.exit == "loads the model"
    lines = outcome.stdout.splitlines()
    assert len(lines) == (0 if is_same else 1)
    assert all("NVIDIA A100-SXM4-80GB" in line and "find_batch" in line for line in lines)


# Resume


def kill_after_the_first_checkpoint() -> None:
    def save_and_die(folder: Path, step: int, state: dict[str, Any]) -> None:
        save_checkpoint(folder, step, state)
        os.kill(os.getpid(), signal.SIGKILL)

    loop.save_checkpoint = save_and_die


def kill_in_the_second_checkpoint() -> None:
    save = torch.save

    def save_or_die(state: Any, file: Path) -> None:
        if file.parent.name == "checkpoint-6":
            file.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = save_or_die


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("prepare", [kill_after_the_first_checkpoint, kill_in_the_second_checkpoint])
def test_a_killed_training_resumes_from_its_checkpoint(outputs: Path, prepare: Callable[[], None]) -> None:
    for folder in ("models/adapter", "metrics/train", "logs"):
        shutil.rmtree(folder)
    with pytest.raises(AssertionError, match="exit code -9"):
        run_one(prepare)
    assert "checkpoint-3" in checkpoints()
    assert not Path("models/adapter").exists()
    shutil.rmtree("metrics/train")  # as DVC does before it runs a stage
    shutil.rmtree("logs")

    assert run_one().exit is None

    assert read("metrics/machine.json")["train"]["steps"] == NUM_STEPS - 3
    files = [file.relative_to(outputs) for name in ("models/adapter", "metrics/train")
             for file in (outputs / name).rglob("*") if file.is_file()]  # fmt: skip
    assert len(files) == 2 + 7
    for file in files:
        assert file.read_bytes() == (outputs / file).read_bytes(), file
    assert checkpoints() == set()


@pytest.mark.usefixtures("trained")
def test_a_signal_saves_a_checkpoint_and_the_next_run_resumes(outputs: Path) -> None:
    shutil.rmtree("models/adapter")

    def send_in_step_2() -> None:
        step = loop.Learner.step

        def step_with_signal(learner: Any, *arguments: Any, **settings: Any) -> Any:
            if arguments[2] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(learner, *arguments, **settings)

        loop.Learner.step = step_with_signal  # type: ignore[method-assign]

    message = run_one(send_in_step_2).exit

    for words in ("SIGTERM", "step 2", "checkpoint", "dvc repro"):
        assert words in message
    assert checkpoints() == {"checkpoint-2"}
    assert not Path("models/adapter").exists()

    assert run_one().exit is None

    assert read("metrics/machine.json")["train"]["steps"] == NUM_STEPS - 2
    assert same(adapter_in(Path()), adapter_in(outputs))


def fingerprint_now() -> str:
    batch = read("metrics/batch.json")
    plan = loop.BatchPlan(
        "reference", batch["gradient_checkpointing"], batch["per_device_batch"], batch["effective_batch"]
    )
    return job.run_fingerprint(read_params(), plan)


@pytest.mark.parametrize("setting", ["mlp", "offload"])
def test_a_batch_of_other_kernels_is_refused_in_one_line(project: Any, setting: str) -> None:
    project.configure(batch={"gradient_checkpointing": setting, "device": "NVIDIA H200"})

    assert run_one().exit == (
        f"error: train: metrics/batch.json has gradient_checkpointing '{setting}', which the reference kernels of this "
        "machine do not support. Measure here: dvc repro -f -s find_batch"
    )


def test_measurements_that_fail_lose_neither_adapter_nor_checkpoints(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "measurements", lambda *arguments: 1 / 0)
    monkeypatch.setattr(job, "log_to_file", lambda folder: folder)  # which would change the logging of later tests

    with pytest.raises(ZeroDivisionError):
        job.run(read_params(), None)

    assert Path("models/adapter/adapter_model.safetensors").exists()
    assert list(Path(".scratch/train").glob("*/checkpoint-*"))


def test_the_fingerprint_changes_with_all_that_the_adapter_depends_on(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = project.folder / "code"
    code.mkdir()
    (code / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(job, "stage_code", lambda stage: [code])

    def fingerprint(changes: dict[str, Any] | None = None) -> str:
        project.configure(changes)
        return fingerprint_now()

    first = fingerprint()
    project.configure(batch={"per_device_batch": 1, "gradient_checkpointing": "none"})  # another division of a step
    assert fingerprint_now() == first
    for changes in ({"sample.seed": 5}, {"compute.num_processes": 2}, {"find_batch.max": 3}):
        assert fingerprint(changes) == first, changes
    changed = [
        fingerprint(changes)
        for changes in (
            {"train.seed": 5},
            {"lora.r": 4},
            {"quantization.bits": 8},
            {"compute.kernels": "fused"},
            {"compute.seq_length": 16},
        )
    ]
    files = ("data/tokens/train.npy", "data/tokens/validation.npy", "models/base/manifest.json", "code/module.py")
    for file in files:
        with Path(file).open("a") as text:
            text.write("\n")
        changed.append(fingerprint())
    project.configure(batch={"effective_batch": 1})
    changed.append(fingerprint_now())
    monkeypatch.setattr(job, "version", lambda name: "9.9")
    changed.append(fingerprint_now())
    assert len({first, *changed}) == 1 + len(changed)


def test_the_code_of_the_fingerprint_is_that_of_dvc_yaml() -> None:
    files = job.stage_code("train")

    assert all(file.exists() for file in files)
    assert any("training" in str(file) for file in files)


# Several processes


def test_two_processes_write_what_one_writes(project: Any, outputs: Path, trained: Any) -> None:
    """The main process alone writes and prints. Without dropout the losses agree."""
    results = {}
    for count in (1, 2):
        project.configure({"lora.lora_dropout": 0.0, "train.learning_rate": 0.0005})
        shutil.rmtree("models/adapter")
        shutil.rmtree("logs", ignore_errors=True)
        outcomes = run(count)
        assert [outcome.exit for outcome in outcomes] == [None] * count
        assert [len(outcome.stdout.splitlines()) for outcome in outcomes] == [1] + [0] * (count - 1)
        assert read("metrics/machine.json")["train"]["num_processes"] == count
        assert f"processes: {count}" in log_of(Path())
        results[count] = read("metrics/train/metrics.json"), adapter_in(Path())

    for split in ("train", "validation"):
        assert results[2][0][split]["loss"] == pytest.approx(results[1][0][split]["loss"], rel=1e-5)
    for name, value in results[1][1].items():
        torch.testing.assert_close(results[2][1][name], value, rtol=0, atol=2e-3)


def test_replay_text_is_mixed_in_and_its_share_is_in_the_metrics(project: Any) -> None:
    """One process and two give the same training."""
    project.configure({"lora.lora_dropout": 0.0, "train.replay": "books", "train.replay_share": 0.4})
    texts = [prose(seed, 20) for seed in range(30, 33)]
    write_split(Path(), "replay", texts, Path("models/base"))
    results = {}
    for count in (1, 2):
        shutil.rmtree("models/adapter", ignore_errors=True)
        assert [outcome.exit for outcome in run(count)] == [None] * count
        results[count] = read("metrics/train/metrics.json"), adapter_in(Path())

    metrics = results[1][0]
    corpus, replay = (TokenFile.open(Path("data/tokens"), name).sequences(32) for name in ("train", "replay"))
    num_replay = round(0.4 / 0.6 * len(corpus))
    assert len(replay) >= num_replay
    assert metrics["step"] == math.ceil((len(corpus) + num_replay) / 2) > NUM_STEPS
    assert metrics["replay_share"] == pytest.approx(num_replay / (len(corpus) + num_replay), abs=0.02)
    assert results[2][0]["replay_share"] == metrics["replay_share"]
    for name, value in results[1][1].items():
        torch.testing.assert_close(results[2][1][name], value, rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_an_adapter_that_starts_from_the_weights_is_loaded_as_it_was_trained(project: Any, method: str) -> None:
    """Two processes train; the loaded model has the validation loss of the last step."""
    project.configure({"lora.init_lora_weights": method, "train.num_train_epochs": 0.5})
    assert [outcome.exit for outcome in run(2)] == [None, None]

    lora = changed(LORA, init_lora_weights=method)
    model = load_adapter(load_base(Path("models/base"), QUANTIZATION, COMPUTE), Path("models/adapter"))
    restore_trained_base(model, Path("models/base"), Path("models/adapter"), lora)

    validation = TokenFile.open(Path("data/tokens"), "validation").windows(seq_length=32, stride=32)
    alone = Processes.alone(torch.device("cpu"))
    nats = nats_per_token(build_forward(model, "reference"), validation, per_device_batch=8, processes=alone)
    assert nats == pytest.approx(read("metrics/train/metrics.json")["validation"]["loss"], rel=1e-5)


@pytest.mark.timeout(300)  # two processes import torch
def test_the_stage_starts_its_processes_itself(project: Any) -> None:
    """`python -m stages.train` uses the launcher. The bytes are the same as with another launcher."""
    project.configure({"compute.num_processes": 2, "train.num_train_epochs": 0.2})
    assert [outcome.exit for outcome in run(2)] == [None, None]
    expected = Path("models/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree("models/adapter")

    done = subprocess.run(
        [sys.executable, "-m", "stages.train"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert read("metrics/machine.json")["train"]["num_processes"] == 2
    assert Path("models/adapter/adapter_model.safetensors").read_bytes() == expected
