"""The training loop on a tiny model: in one process, then in several."""

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_forked
from tiny_llama import (
    COMPUTE,
    LORA,
    TRAIN,
    changed,
    quiet,
    random_sequences,
    same,
    tensors_of,
    trainable,
)
from tiny_training import (
    NO_DROPOUT,
    NUM_SEQUENCES,
    VALIDATION_WINDOWS,
    Recorder,
    Training,
    build_learner,
    run_training,
)
from transformers import get_scheduler

from pdf2lora.errors import InputError
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import IGNORED, Sequences
from pdf2lora.training import loop
from pdf2lora.training.data_order import DataOrder
from pdf2lora.training.loop import Learner, dropout_seed
from pdf2lora.training.tracking import Tracker

pytestmark = quiet
LONG = changed(TRAIN, num_train_epochs=2, logging_steps=3, save_steps=2)  # 8 steps
Run = Callable[..., Training]


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Any:
    """run_training; each call without a folder of checkpoints gets a new one."""
    number = 0

    def run(checkpoints: Path | None = None, **settings: Any) -> Training:
        nonlocal number
        number += 1
        return run_training(base, checkpoints or tmp_path / f"checkpoints-{number}", **settings)

    yield run
    torch.use_deterministic_algorithms(False)


# The same adapter again


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_same_seed_gives_the_same_bytes(run: Run, bits: int) -> None:
    one, again = (run(bits=bits) for _ in range(2))

    assert same(one.adapter, again.adapter)
    assert one.history == again.history


def test_another_seed_gives_another_adapter(base: Path, run: Run) -> None:
    settings = [changed(TRAIN, seed=seed) for seed in (0, 1)]
    at_start = [trainable(build_learner(base, train=train).model) for train in settings]
    assert not same(*at_start)

    one, other = (run(train_settings=train) for train in settings)

    assert not same(one.adapter, other.adapter)
    assert one.values("train/loss") != other.values("train/loss")


def test_intervals_of_validation_logs_and_checkpoints_do_not_change_the_adapter(run: Run) -> None:
    """Validation, checkpoints and log entries must not change the training."""
    plain = run(validation_windows=[])
    busy = run(train_settings=changed(TRAIN, eval_steps=1, save_steps=1, logging_steps=3))

    assert same(plain.adapter, busy.adapter)


def test_training_changes_every_lora_matrix_and_nothing_else(base: Path, run: Run) -> None:
    before = {name: value.detach().clone() for name, value in build_learner(base).model.named_parameters()}

    model = run().learner.model

    assert before.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms_follow_the_setting(run: Run, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(not deterministic)

    run(compute=changed(COMPUTE, deterministic=deterministic))

    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_no_bit(run: Run, dropout: float) -> None:
    lora = changed(LORA, lora_dropout=dropout)

    full, none = (run(lora=lora, gradient_checkpointing=setting) for setting in ("full", "none"))

    assert full.learner.model.get_base_model().is_gradient_checkpointing
    assert not none.learner.model.get_base_model().is_gradient_checkpointing
    assert same(full.adapter, none.adapter)
    assert full.history == none.history


def test_the_per_device_batch_does_not_change_the_losses(run: Run) -> None:
    """With dropout, even if the per-device batch does not divide the effective batch, or that the corpus."""
    train = changed(TRAIN, effective_batch=3, learning_rate=0.001)

    losses = {
        batch: run(per_device_batch=batch, train_settings=train, validation_windows=[]).values("train/loss")
        for batch in (1, 2, 3, 8)
    }

    assert len(losses[3]) == 3
    for batch, found in losses.items():
        assert found == pytest.approx(losses[3], rel=1e-6), batch


# Learning


def test_loss_goes_down_on_one_batch(run: Run) -> None:
    train = changed(TRAIN, num_train_epochs=25, lr_scheduler_type="constant", warmup_steps=0)

    losses = run(train_settings=train, sequences=random_sequences(2)).values("train/loss")

    assert losses[-1] < losses[0] - 2
    assert losses[-1] < min(losses[:5])


def test_the_loss_of_a_step_is_the_mean_over_its_targets(base: Path, run: Run) -> None:
    sequences = Sequences(random_sequences(2).stream[: 32 + 8 + 1], 32)

    (loss,) = run(
        lora=NO_DROPOUT, sequences=sequences, per_device_batch=1, validation_windows=[]
    ).values("train/loss")  # fmt: skip

    with torch.no_grad():
        inputs, targets = tensors_of(sequences)
        logits = build_learner(base, lora=NO_DROPOUT).model.eval()(input_ids=inputs).logits.double()
    nats = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="sum")
    assert loss == pytest.approx(nats.item() / (32 + 8), rel=1e-5)


def test_every_token_is_a_target_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the micro-batches of an epoch: each target is the token after its input."""
    documents = [np.arange(start, start + length) for start, length in ((0, 40), (40, 3), (43, 120))]
    pairs = []

    def record(micro_batch: Any, inputs: torch.Tensor, targets: torch.Tensor, **settings: Any) -> None:
        pairs.extend(zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True))
        micro_batch.parameters.loss.add_(1)

    monkeypatch.setattr(loop.MicroBatch, "__call__", record)
    bos, eos = 256, 257
    stream = [token for document in documents for token in (bos, *document.tolist(), eos)]
    sequences = Sequences(np.array(stream, dtype=np.int32), 32)
    run(sequences=sequences, train_settings=changed(TRAIN, effective_batch=3))

    targets = [(token, target) for token, target in pairs if target != IGNORED]
    assert sorted(targets) == sorted(itertools.pairwise(stream))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_the_learning_rate_follows_the_schedule_of_transformers(run: Run, kind: str) -> None:
    train = changed(TRAIN, learning_rate=0.002, warmup_steps=3, lr_scheduler_type=kind, num_train_epochs=2)

    training = run(train_settings=train, validation_windows=[])

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.002)
    schedule = get_scheduler(kind, optimizer, 3, 8)
    expected = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert training.values("learning_rate") == expected
    if kind != "constant":
        assert expected[0] == pytest.approx(0.002 / 3)


@pytest.mark.parametrize(("max_grad_norm", "is_clipped"), [(0.01, True), (1e6, False)])
def test_the_gradient_is_clipped(run: Run, max_grad_norm: float, is_clipped: bool) -> None:
    """After one step the first moment of Adam is the clipped gradient times 1 - beta1."""
    train = changed(TRAIN, optim="adamw_torch", max_grad_norm=max_grad_norm, num_train_epochs=0.25)  # one step

    training = run(train_settings=train)

    (norm,) = training.values("gradient_norm")
    assert norm > 0.1
    (state,) = training.learner.optimizer.state.values()
    assert state["exp_avg"].norm().item() / (1 - 0.9) == pytest.approx(0.01 if is_clipped else norm, rel=1e-3)


def test_a_log_entry_has_the_mean_loss_since_the_last_one(run: Run) -> None:
    every = run(train_settings=changed(LONG, logging_steps=1), validation_windows=[]).values("train/loss")

    training = run(train_settings=LONG, validation_windows=[])

    assert [entry["step"] for entry in training.history] == [1, 3, 6, 8]
    expected = [every[0], np.mean(every[1:3]), np.mean(every[3:6]), np.mean(every[6:])]
    assert training.values("train/loss") == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_training_also_between_log_entries(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(learner: Learner, sequences: Any, indices: Any, number: int, **settings: Any) -> torch.Tensor:
        learner.parameters.loss.fill_(float("nan") if number == 2 else 5.0)
        return torch.ones(())

    monkeypatch.setattr(Learner, "step", step)

    with pytest.raises(InputError, match="the loss of step 3 is nan"):
        run(train_settings=changed(LONG, logging_steps=1000), validation_windows=[])


@pytest.mark.parametrize("step_of_signal", [4, None])
def test_late_log_entries_change_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step_of_signal: int | None
) -> None:
    """With a CUDA graph, the entry of a step is written while the GPU computes the next step."""
    settings = changed(LONG, logging_steps=1, eval_steps=3, save_steps=4)
    expected = run(train_settings=settings)
    monkeypatch.setattr(Learner, "is_asynchronous", True)
    written: list[tuple[int, int]] = []  # (steps that began, step of the entry)
    began = 0

    def before_step(step: int) -> None:
        nonlocal began
        began = step + 1
        if step == step_of_signal:
            os.kill(os.getpid(), signal.SIGTERM)

    def log(tracker: Recorder, history: list[Any], entry: Any) -> None:
        written.append((began, entry["step"]))
        Tracker.log(tracker, history, entry)
        tracker.history = history

    monkeypatch.setattr(Recorder, "log", log)
    training = run(tmp_path / "late", train_settings=settings, before_step=before_step)
    if step_of_signal is not None:
        assert (training.result.steps, training.result.stopped_by) == (5, "SIGTERM")
        training = run(tmp_path / "late", train_settings=settings)

    assert training.history == expected.history
    assert same(training.adapter, expected.adapter)
    assert (2, 1) in written  # step 1 is written after step 2 began,
    assert (3, 2) in written
    assert (3, 3) in written  # but an entry waits for no validation


def test_the_dropout_seed_depends_on_seed_and_step() -> None:
    seeds = {dropout_seed(seed, step) for seed in range(20) for step in range(20)}

    assert len(seeds) == 400
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert len({seed % 2**31 for seed in seeds}) == 400


# Validation


def test_validation_loss_is_the_mean_nats_of_a_token(run: Run) -> None:
    training = run()

    nats = nats_per_document(
        training.learner.forward, VALIDATION_WINDOWS, num_documents=3, per_device_batch=3, processes=Processes()
    )
    assert training.values("validation/loss")[-1] == pytest.approx(nats.sum() / (50 + 9 + 70), rel=1e-6)


@pytest.mark.parametrize(
    ("eval_steps", "num_train_epochs", "steps"),
    [(2, 1, [0, 2, 4]), (3, 1, [0, 3, 4]), (4, 1, [0, 4]), (100, 1, [0, 4]), (1, 0.5, [0, 1, 2])],
)
def test_validation_runs_at_the_start_every_eval_steps_and_at_the_end(
    run: Run, eval_steps: int, num_train_epochs: float, steps: list[int]
) -> None:
    train = changed(TRAIN, eval_steps=eval_steps, num_train_epochs=num_train_epochs)

    training = run(train_settings=train)

    assert [entry["step"] for entry in training.history if "validation/loss" in entry] == steps


def test_after_a_validation_the_model_is_in_train_mode(base: Path) -> None:
    learner = build_learner(base)

    learner.validate(VALIDATION_WINDOWS)

    assert all(module.training for module in learner.model.modules())


@pytest.fixture
def validation_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Replaces the validation losses: before the first step, after step 1, ..."""

    def replace(losses: list[float]) -> None:
        remaining = list(losses)
        monkeypatch.setattr(Learner, "validate", lambda learner, windows: remaining.pop(0))

    return replace


BEST = changed(TRAIN, keep="best", eval_steps=1, save_steps=1, warmup_steps=0)


@pytest.mark.parametrize(
    ("losses", "kept_step"),
    [([5, 4, 3, 2, 1], 4), ([5, 4, 3, 3.5, 3.2], 2), ([5, 4, 3, 3, 3], 2), ([5, 6, 7, 8, 9], 0)],
)
def test_keep_best_restores_the_adapter_with_the_lowest_validation_loss(
    run: Run, monkeypatch: pytest.MonkeyPatch, losses: list[float], kept_step: int
) -> None:
    adapters: list[Any] = []

    def validate(learner: Learner, windows: Any) -> float:
        adapters.append(trainable(learner.model))
        return losses[len(adapters) - 1]

    monkeypatch.setattr(Learner, "validate", validate)

    training = run(train_settings=BEST)

    assert (training.result.steps, training.result.kept_step) == (4, kept_step)
    assert same(training.adapter, adapters[kept_step])
    assert not same(adapters[0], adapters[1])


def test_keep_last_does_not_restore(run: Run, validation_losses: Any) -> None:
    last = changed(BEST, keep="last")
    expected = run(train_settings=last).adapter
    validation_losses([5, 1, 2, 3, 4])

    training = run(train_settings=last)

    assert training.result.kept_step == 4
    assert same(training.adapter, expected)


@pytest.mark.parametrize(
    ("patience", "losses", "num_steps"),
    [
        (1, [5, 6], 1),
        (2, [5, 4, 4, 4], 3),
        (2, [5, 6, 4, 5, 3], 4),
        (3, [5, 6, 6, 4, 9], 4),
        ("none", [5, 6, 7, 8, 9], 4),
    ],
)
def test_early_stopping(run: Run, validation_losses: Any, patience: Any, losses: list[float], num_steps: int) -> None:
    validation_losses(losses)

    training = run(train_settings=changed(BEST, keep="last", early_stopping_patience=patience))

    assert training.result.steps == num_steps
    assert training.result.stopped_by is None
    assert training.values("validation/loss") == losses


def test_a_checkpoint_of_a_stopped_training_does_not_continue(run: Run, validation_losses: Any, tmp_path: Path) -> None:
    """The best adapter also comes from the checkpoint."""
    train = changed(BEST, early_stopping_patience=2)
    validation_losses([5, 4, 4.5, 4.2])
    stopped = run(tmp_path / "early", train_settings=train)
    assert (stopped.result.steps, stopped.result.kept_step) == (3, 1)

    resumed = run(tmp_path / "early", train_settings=train)

    assert resumed.result == loop.TrainingResult(steps=3, first_step=3, kept_step=1, num_targets=0, stopped_by=None)
    assert same(resumed.adapter, stopped.adapter)
    assert resumed.history == stopped.history


# Resume


@pytest.fixture(scope="module")
def complete(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path]:
    """A training of 8 steps, and its checkpoints of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("complete")
    return run_training(base, folder, train_settings=LONG), folder


@pytest.mark.parametrize("step", [6, 8])
def test_a_resumed_training_gives_the_same_bytes(
    run: Run, complete: tuple[Training, Path], tmp_path: Path, step: int
) -> None:
    training, folder = complete
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"copy/checkpoint-{step}")

    resumed = run(tmp_path / "copy", train_settings=LONG)

    assert (resumed.result.first_step, resumed.result.steps) == (step, 8)
    assert same(resumed.adapter, training.adapter)
    assert resumed.history == training.history
    assert resumed.result.num_targets == (8 - step) * 2 * 32


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"])
def test_every_optimizer_resumes_with_the_same_bytes(run: Run, tmp_path: Path, optim: str) -> None:
    train = changed(TRAIN, optim=optim, lr_scheduler_type="linear")
    training = run(tmp_path / "complete", train_settings=train)
    shutil.copytree(tmp_path / "complete/checkpoint-2", tmp_path / "copy/checkpoint-2")

    resumed = run(tmp_path / "copy", train_settings=train)

    assert resumed.result.first_step == 2
    assert same(resumed.adapter, training.adapter)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_and_the_next_run_gives_the_same_bytes(
    run: Run, complete: tuple[Training, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Step 5 is between two log entries and between two checkpoints."""

    def send_in_step_5(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    handler = signal.signal(number, signal.SIG_DFL)
    try:
        stopped = run(tmp_path / "stopped", train_settings=LONG, before_step=send_in_step_5)
    finally:
        signal.signal(number, handler)
    assert (stopped.result.steps, stopped.result.stopped_by) == (5, number.name)
    assert (tmp_path / "stopped/checkpoint-5").exists()

    resumed = run(tmp_path / "stopped", train_settings=LONG)

    assert resumed.result.first_step == 5
    assert same(resumed.adapter, complete[0].adapter)
    assert resumed.history == complete[0].history


def test_a_signal_in_the_last_step_does_not_stop_a_finished_training(run: Run, validation_losses: Any) -> None:
    """The best adapter is kept too."""
    validation_losses([5, 4, 3, 6, 7])

    training = run(
        train_settings=BEST, before_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    )

    assert training.result.stopped_by is None
    assert (training.result.steps, training.result.kept_step) == (4, 2)


# Several processes


def losses_and_adapter(base: Path, folder: Path, count: int, **settings: Any) -> list[tuple[list[float], bytes, int]]:
    """Returns for each process: the loss of each step, the bytes of the adapter, the number of targets."""

    def work(processes: Processes) -> tuple[list[float], bytes, int]:
        training = run_training(base, folder, processes=processes, **settings)
        adapter = training.learner.parameters.parameter.detach().numpy().tobytes()
        return training.values("train/loss") + training.values("validation/loss"), adapter, training.result.num_targets

    return run_forked(count, work)


SEVERAL: dict[str, Any] = {
    # 7 sequences: steps of 5 and 2, so a step has fewer sequences than there are processes
    "train_settings": changed(TRAIN, effective_batch=5, num_train_epochs=2, learning_rate=0.001),
    "sequences": random_sequences(7),
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_number_of_processes_does_not_change_the_losses(base: Path, tmp_path: Path, dropout: float) -> None:
    settings = SEVERAL | {"lora": changed(LORA, lora_dropout=dropout)}

    results = {count: losses_and_adapter(base, tmp_path / str(count), count, **settings) for count in (1, 2, 3)}

    expected = results[1][0]
    assert len(expected[0]) == 4 + 3
    for processes in results.values():
        assert len({adapter for _, adapter, _ in processes}) == 1
        for losses, _, num_targets in processes:
            assert losses == pytest.approx(expected[0], rel=1e-6)
            assert num_targets == expected[2] == 14 * 32


def test_the_same_number_of_processes_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    one, again = (losses_and_adapter(base, tmp_path / name, 2, **SEVERAL) for name in ("one", "again"))

    assert one == again


def test_a_resume_with_another_number_of_processes(base: Path, tmp_path: Path) -> None:
    """2, then 1, then 2 processes give nearly the losses of 2 processes. 2 processes after 2 give the same bytes."""
    complete = losses_and_adapter(base, tmp_path / "complete", 2, **SEVERAL)[0]
    folder = tmp_path / "mixed"

    for count, stop_after in ((2, 1), (1, 3)):

        def stop(step: int, stop_after: int = stop_after) -> None:
            if step == stop_after - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def work(processes: Processes, stop: Any = stop) -> int:
            return run_training(base, folder, processes=processes, before_step=stop, **SEVERAL).result.steps

        assert run_forked(count, work) == [stop_after] * count
        if stop_after == 1:
            shutil.copytree(folder, tmp_path / "same")

    mixed = losses_and_adapter(base, folder, 2, **SEVERAL)[0]
    assert mixed[0] == pytest.approx(complete[0], rel=1e-6)
    assert losses_and_adapter(base, tmp_path / "same", 2, **SEVERAL)[0][:2] == complete[:2]


@pytest.mark.parametrize(("is_asynchronous", "last_step"), [(False, 2), (True, 3)])
def test_a_stop_request_of_one_process_stops_all_at_the_same_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_asynchronous: bool, last_step: int
) -> None:
    """With a CUDA graph, the processes read the sum of a step while the GPU computes the next one."""
    monkeypatch.setattr(Learner, "is_asynchronous", is_asynchronous)

    def work(processes: Processes) -> tuple[int, str | None]:
        def stop(step: int) -> None:
            if step == 1 and processes.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        settings = SEVERAL | {"train_settings": changed(SEVERAL["train_settings"], eval_steps=9, save_steps=9)}
        result = run_training(base, tmp_path, processes=processes, before_step=stop, **settings).result
        return result.steps, result.stopped_by

    first, second, third = run_forked(3, work)

    assert second == (last_step, "SIGTERM")
    assert first == third
    assert first[0] == last_step
    assert first[1] is not None
    assert (tmp_path / f"checkpoint-{last_step}").exists()


def test_processes_with_different_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    def work(processes: Processes) -> str:
        train = changed(TRAIN, seed=processes.index)
        with pytest.raises(RuntimeError, match="initial adapter differs") as caught:
            run_training(base, tmp_path, train_settings=train, processes=processes)
        return str(caught.value)

    messages = run_forked(2, work)

    assert messages[0] == messages[1]


def test_an_epoch_has_the_same_global_batches_in_processes_of_any_number(base: Path, tmp_path: Path) -> None:
    """Compares the sequences that all processes together compute in a step, with their positions in the step."""
    sequences = random_sequences(NUM_SEQUENCES)
    order = DataOrder(NUM_SEQUENCES, 3, 1, 0)

    def work(processes: Processes) -> list[tuple[int, bytes]]:
        learner = build_learner(base, processes=processes, per_device_batch=1)
        computed: list[tuple[int, bytes]] = []

        def record(inputs: torch.Tensor, targets: torch.Tensor, *, first_sequence: int, **settings: Any) -> None:
            computed.append((first_sequence, inputs.numpy().tobytes()))

        learner.micro_batch = record  # type: ignore[assignment]
        learner.step(sequences, order.indices(1), 1)
        return computed

    expected = [(place, sequences.batch(np.array([row]))[0].tobytes()) for place, row in enumerate(order.indices(1))]
    for count in (1, 2, 3):
        assert [pair for computed in run_forked(count, work) for pair in computed] == expected
