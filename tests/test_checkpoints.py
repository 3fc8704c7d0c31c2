import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from pdf2lora.training.trainer import build_model, build_trainer
from tiny_llama import (
    COMPUTE,
    LORA,
    QUANTIZATION,
    TRAIN,
    changed,
    quiet,
    random_sequences,
    same,
    trainable,
    write_tiny_llama,
)
from transformers import TrainerCallback

from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.training.checkpoints import CheckpointKeeper, latest_valid, step_of

pytestmark = [quiet, pytest.mark.usefixtures("server_of_children")]
SETTINGS = changed(TRAIN, save_steps=2, logging_steps=3, num_train_epochs=2)  # 8 steps, 4 an epoch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


def build(base, folder, train=SETTINGS):
    return build_trainer(
        build_model(base, QUANTIZATION, LORA, COMPUTE, seed=train.seed),
        random_sequences(8),
        train=train,
        compute=COMPUTE,
        kernels="reference",
        gradient_checkpointing="full",
        per_device_batch=2,
        gradient_accumulation_steps=1,
        checkpoints=folder,
    )


def train_on(base, folder, train=SETTINGS):
    """What the stage does: from the newest whole checkpoint, if there is one, to the end."""
    trainer = build(base, folder, train)
    checkpoint = latest_valid(folder)
    keeper = CheckpointKeeper(trainer, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    keeper.exit_if_interrupted()
    return trainer


class SignalAt(TrainerCallback):
    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def train_until(numbers, step, base, folder):
    trainer = build(base, folder)
    trainer.add_callback(SignalAt(step, *numbers))
    keeper = CheckpointKeeper(trainer, None)
    trainer.train()
    try:
        keeper.exit_if_interrupted()
    except SystemExit as ended:
        (folder / "said").write_text(str(ended.code))
        raise


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_on(base, folder), folder


def losses(trainer):
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def exit_status_after(numbers, base, folder):
    child = multiprocessing.get_context("forkserver").Process(target=train_until, args=(numbers, 5, base, folder))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM],
        [signal.SIGINT],
        [signal.SIGTERM, signal.SIGTERM],  # to all processes: the second one is from the watch of orphans.py
        [signal.SIGINT, signal.SIGTERM],
        [signal.SIGHUP, signal.SIGHUP],
    ],
)
def test_a_signal_saves_a_checkpoint_and_training_goes_on_to_the_same_adapter_and_curve(
    base, undisturbed, tmp_path, numbers
):
    assert exit_status_after(numbers, base, tmp_path) == 1
    assert (tmp_path / "said").read_text() == (
        f"train: ended by {numbers[0].name} after step 5, checkpoint saved; dvc repro goes on from there"
    )
    assert latest_valid(tmp_path) == str(tmp_path / "checkpoint-5")

    resumed = train_on(base, tmp_path)

    assert losses(resumed) == losses(undisturbed[0])  # step 5 lies between the log entries of 3 and 6
    assert same(trainable(resumed.model), trainable(undisturbed[0].model))


def test_a_second_ctrl_c_ends_at_once(base, tmp_path):
    assert exit_status_after([signal.SIGINT, signal.SIGINT], base, tmp_path) == 1
    assert not (tmp_path / "said").exists()
    assert latest_valid(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_signal_that_is_ignored_stays_ignored(base, tmp_path):
    """nohup: the end of the terminal does not end the training."""
    trainer = build(base, tmp_path)
    trainer.add_callback(SignalAt(2, signal.SIGHUP))
    CheckpointKeeper(trainer, None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)

    assert trainer.state.global_step == 8


def test_handlers_are_those_of_before_when_training_has_ended(base, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    train_on(base, tmp_path)

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def copied(undisturbed, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(undisturbed[1], folder)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-6", "checkpoint-8"}
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "trainer_state.json", "scheduler.pt"]
)
def test_a_flipped_bit_in_the_newest_falls_back_to_the_one_before(undisturbed, tmp_path, capsys, name):
    folder = copied(undisturbed, tmp_path)
    flip(folder / "checkpoint-8" / name)

    assert latest_valid(folder) == str(folder / "checkpoint-6")

    assert capsys.readouterr().out == (
        f"train: checkpoint-8 is not used, {name} is corrupt (SHA-256 mismatch); goes on from checkpoint-6\n"
    )
    assert not (folder / "checkpoint-8").exists()


def test_training_goes_on_from_the_one_before_to_the_same_adapter(base, undisturbed, tmp_path):
    folder = copied(undisturbed, tmp_path)
    flip(folder / "checkpoint-8/optimizer.pt")

    resumed = train_on(base, folder)

    assert same(trainable(resumed.model), trainable(undisturbed[0].model))
    assert losses(resumed) == losses(undisturbed[0])


def test_training_goes_on_from_a_checkpoint_at_its_end(base, undisturbed, tmp_path):
    resumed = train_on(base, copied(undisturbed, tmp_path))

    assert resumed.state.global_step == 8
    assert same(trainable(resumed.model), trainable(undisturbed[0].model))
    assert losses(resumed) == losses(undisturbed[0])


def test_a_last_checkpoint_in_the_middle_of_an_epoch_is_not_gone_on_from(base, tmp_path, capsys):
    """The Trainer takes one more step from there: its loop over an epoch's batches asks whether to stop afterwards."""
    short = changed(SETTINGS, num_train_epochs=1.5)
    whole = trainable(train_on(base, tmp_path, short).model)

    resumed = train_on(base, tmp_path, short)

    assert resumed.state.global_step == 6
    assert same(trainable(resumed.model), whole)
    assert "checkpoint-6 is not used, it is the last one" in capsys.readouterr().out


def test_the_trainer_still_adds_a_step_there(base, tmp_path):
    """The reason for the rule above; where this fails the rule can go."""
    short = changed(SETTINGS, num_train_epochs=1.5)
    train_on(base, tmp_path, short)
    trainer = build(base, tmp_path, short)

    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))

    assert trainer.state.global_step == 7


def test_an_unfinished_checkpoint_is_removed(undisturbed, tmp_path, capsys):
    folder = copied(undisturbed, tmp_path)
    (folder / "checkpoint-8" / MANIFEST).unlink()

    assert latest_valid(folder) == str(folder / "checkpoint-6")

    assert capsys.readouterr().out == (
        "train: checkpoint-8 is not used, it is incomplete (no manifest.json); goes on from checkpoint-6\n"
    )


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_checkpoint_that_cannot_be_read_is_not_used(undisturbed, tmp_path, damage):
    folder = copied(undisturbed, tmp_path)
    manifest = folder / "checkpoint-8" / MANIFEST
    match damage:
        case "cut":
            manifest.write_text(manifest.read_text()[:40])
        case "missing":
            (folder / "checkpoint-8/optimizer.pt").unlink()
        case "other":
            manifest.write_text("[]")

    assert latest_valid(folder) == str(folder / "checkpoint-6")


def test_without_a_whole_checkpoint_training_starts_from_the_base_model(undisturbed, tmp_path, capsys):
    folder = copied(undisturbed, tmp_path)
    for checkpoint in folder.iterdir():
        flip(checkpoint / "optimizer.pt")

    assert latest_valid(folder) is None

    assert capsys.readouterr().out.count("goes on from the base model") == 2
    assert list(folder.iterdir()) == []
    assert latest_valid(Path("nowhere")) is None


def test_a_manifest_knows_every_file(undisturbed):
    checkpoint = undisturbed[1] / "checkpoint-8"
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]

    assert {path.name for path in checkpoint.iterdir()} == {MANIFEST, *listed}
    assert {"optimizer.pt", "adapter_model.safetensors", "trainer_state.json"} <= listed.keys()


@pytest.mark.parametrize(("checkpoint", "step"), [("a/checkpoint-40", 40), (Path("checkpoint-0"), 0), (None, 0)])
def test_step_of(checkpoint, step):
    assert step_of(checkpoint) == step
