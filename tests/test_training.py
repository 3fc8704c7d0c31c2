import gc
import os
import shutil
import weakref

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from pdf2lora.training.trainer import build_model, build_trainer, collate
from tiny_llama import (
    BOS,
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

from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.tokens import IGNORED, Sequences, windows

pytestmark = quiet
NUM_SEQUENCES = 8
NO_DROPOUT = changed(LORA, lora_dropout=0.0)
LOOKS = [
    window
    for number, length in enumerate([50, 9, 70])
    for window in windows(number, np.arange(length), bos=BOS, seq_length=32, stride=32)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def restore_precision_of_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as a launcher hands it on


@pytest.fixture
def build(base, tmp_path):
    """build_trainer on a new model and 8 random sequences, 2 at a time, with what is given changed."""

    def build(
        *,
        bits=4,
        lora=LORA,
        train=TRAIN,
        compute=COMPUTE,
        sequences=None,
        checkpointing="full",
        folder="checkpoints",
        per_device_batch=2,
        accumulation=1,
        **changes,
    ):
        return build_trainer(
            build_model(base, changed(QUANTIZATION, bits=bits), lora, compute, seed=train.seed),
            random_sequences(NUM_SEQUENCES) if sequences is None else sequences,
            train=train,
            compute=compute,
            kernels="reference",
            gradient_checkpointing=checkpointing,
            per_device_batch=per_device_batch,
            gradient_accumulation_steps=accumulation,
            checkpoints=tmp_path / folder,
            **changes,
        )

    yield build
    torch.use_deterministic_algorithms(False)


def trained(trainer, **kwargs):
    trainer.train(**kwargs)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# the same again


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_same_seed_gives_the_same_adapter(build, bits):
    one, again = (trained(build(bits=bits)) for _ in range(2))

    assert same(trainable(one.model), trainable(again.model))
    assert logged(one, "loss") == logged(again, "loss")


def test_other_seed_gives_another_adapter(build):
    one, other = (build(train=changed(TRAIN, seed=seed)) for seed in (0, 1))
    assert not same(trainable(one.model), trainable(other.model))  # already as they are drawn

    one.train()
    other.train()

    assert not same(trainable(one.model), trainable(other.model))
    assert logged(one, "loss") != logged(other, "loss")


def test_training_changes_every_lora_matrix_and_nothing_else(build):
    trainer = build()
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}

    trainer.train()

    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) != ("lora_" in name), name


def test_accumulated_batches_are_one_batch(build):
    at_once = trained(build(lora=NO_DROPOUT, per_device_batch=2))
    one_by_one = trained(build(lora=NO_DROPOUT, per_device_batch=1, accumulation=2))

    assert logged(at_once, "loss") == pytest.approx(logged(one_by_one, "loss"), abs=1e-5)
    assert logged(at_once, "grad_norm") == pytest.approx(logged(one_by_one, "grad_norm"), rel=1e-4)
    assert at_once.state.global_step == one_by_one.state.global_step == NUM_SEQUENCES // 2


def test_padding_weighs_nothing_in_an_accumulated_step(build):
    """Each learned token counts alike, wherever it stands: not the mean of the batches' means."""
    sequences = random_sequences(2)
    sequences.labels[1, 8:] = IGNORED
    train = changed(TRAIN, num_train_epochs=1)

    at_once = trained(build(sequences=sequences, train=train, lora=NO_DROPOUT, per_device_batch=2))
    one_by_one = trained(build(sequences=sequences, train=train, lora=NO_DROPOUT, per_device_batch=1, accumulation=2))

    with torch.no_grad():
        ids = torch.from_numpy(sequences.input_ids)
        logits = build(lora=NO_DROPOUT).model.eval()(input_ids=ids).logits[:, :-1].double()
    targets = torch.from_numpy(sequences.labels)[:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="sum")
    expected = nats.item() / (31 + 7)
    assert logged(at_once, "loss") == pytest.approx([expected], rel=1e-5)
    assert logged(one_by_one, "loss") == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("looks", [(), LOOKS])
def test_killed_training_goes_on_from_a_checkpoint_to_the_same_adapter(build, tmp_path, looks):
    whole = trained(build(validation_windows=looks, folder="whole"))
    (state,) = whole.optimizer.optimizer.state.values()
    assert state["state1"].dtype == torch.uint8
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")

    resumed = build(validation_windows=looks, folder="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed/checkpoint-2"))

    assert same(trainable(resumed.model), trainable(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_checkpoints_are_written_every_save_steps_and_two_are_kept(build, tmp_path):
    trained(build(train=changed(TRAIN, num_train_epochs=2)))  # 8 steps

    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_no_bit(build, dropout):
    lora = changed(LORA, lora_dropout=dropout)
    full, none = (trained(build(lora=lora, checkpointing=checkpointing)) for checkpointing in ("full", "none"))

    assert full.model.get_base_model().is_gradient_checkpointing
    assert not none.model.get_base_model().is_gradient_checkpointing
    assert same(trainable(full.model), trainable(none.model))
    assert logged(full, "loss") == logged(none, "loss")


def test_a_trainer_takes_the_place_of_an_earlier_one_of_the_same_model(build, base, tmp_path):
    """As the probes of find_batch do, whose model is loaded once."""
    model = build_model(base, QUANTIZATION, NO_DROPOUT, COMPUTE, seed=0)
    sequences = random_sequences(NUM_SEQUENCES)

    def losses(checkpointing):
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        trainer = build_trainer(
            model,
            sequences,
            train=TRAIN,
            compute=COMPUTE,
            kernels="reference",
            gradient_checkpointing=checkpointing,
            per_device_batch=2,
            gradient_accumulation_steps=1,
            checkpoints=tmp_path,
        )
        trainer.train()
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(start[name])
        return logged(trainer, "loss")

    assert losses("none") == losses("full") == logged(trained(build(lora=NO_DROPOUT)), "loss")


def test_gradients_are_forgotten_after_each_step_and_a_trainer_when_it_is_gone(build):
    trainer = trained(build())
    flat = weakref.ref(trainer.optimizer.optimizer.param_groups[0]["params"][0])
    model = trainer.model

    assert not [name for name, value in model.named_parameters() if value.grad is not None]
    del trainer
    gc.collect()
    assert flat() is None


def test_a_step_in_eval_mode_is_a_fault_of_ours(build):
    trainer = build()
    trainer.model.eval()

    with pytest.raises(AssertionError):
        trainer.training_step(trainer.model, {}, torch.tensor(1))


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms_are_used_as_params_say(build, deterministic):
    torch.use_deterministic_algorithms(not deterministic)

    trained(build(compute=changed(COMPUTE, deterministic=deterministic)))

    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory


# learning


def test_loss_goes_down_on_one_batch(build):
    train = changed(TRAIN, num_train_epochs=25, lr_scheduler_type="constant", warmup_steps=0)

    losses = logged(trained(build(sequences=random_sequences(2), train=train)), "loss")

    assert losses[-1] < losses[0] - 2
    assert losses[-1] < min(losses[:5])


def test_learning_rate_warms_up_and_falls_like_a_cosine(build):
    train = changed(TRAIN, learning_rate=0.002, warmup_steps=0.1)
    trainer = build(train=train)

    trainer.create_optimizer_and_scheduler(num_training_steps=100)

    share_after = trainer.lr_scheduler.lr_lambdas[0]
    assert trainer.lr_scheduler.base_lrs[0] == 0.002
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}
    assert {steps: share_after(steps) for steps in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0.0, 0), (0.25, 25), (1.0, 1), (7.0, 7)])
def test_warmup_is_a_share_below_one_and_steps_from_there_on(build, warmup_steps, num_steps):
    arguments = build(train=changed(TRAIN, warmup_steps=warmup_steps)).args

    assert arguments.get_warmup_steps(100) == num_steps


def test_settings_arrive_in_the_optimizer_and_the_arguments(build):
    train = changed(TRAIN, learning_rate=0.003, weight_decay=0.1, max_grad_norm=0.5, num_train_epochs=3, seed=11)
    trainer = build(train=changed(train, lr_scheduler_type="linear", warmup_steps=2, logging_steps=5, save_steps=7))

    optimizer = trainer.create_optimizer()

    assert isinstance(optimizer, bnb.optim.AdamW)
    assert optimizer.is_paged
    assert optimizer.args.optim_bits == 8
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.1)
    assert parameter.numel() == trainer.model.get_nb_trainable_parameters()[0]
    given = {name: getattr(trainer.args, name) for name in ("max_grad_norm", "num_train_epochs", "seed")}
    assert given == {"max_grad_norm": 0.5, "num_train_epochs": 3, "seed": 11}
    given = {name: getattr(trainer.args, name) for name in ("lr_scheduler_type", "logging_steps", "save_steps")}
    assert given == {"lr_scheduler_type": "linear", "logging_steps": 5, "save_steps": 7}


@pytest.mark.parametrize(
    ("optim", "bits", "paged"), [("adamw_8bit", 8, False), ("paged_adamw_32bit", 32, True), ("adamw_torch", None, None)]
)
def test_every_optimizer_of_params_is_made(build, optim, bits, paged):
    optimizer = build(train=changed(TRAIN, optim=optim)).create_optimizer()

    if bits is None:
        assert type(optimizer) is torch.optim.AdamW
    else:
        assert (optimizer.args.optim_bits, optimizer.is_paged) == (bits, paged)


def test_gradients_are_clipped(build):
    """After one step Adam's first moment is the clipped gradient times 1 - beta1."""
    train = changed(TRAIN, optim="adamw_torch", max_grad_norm=0.01, num_train_epochs=0.25)  # one step

    trainer = trained(build(train=train))

    assert logged(trainer, "grad_norm")[0] > 0.1
    (state,) = trainer.optimizer.optimizer.state.values()
    norm = state["exp_avg"].norm() / (1 - 0.9)
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("compute_dtype", "precision"), [("float32", "no"), ("bfloat16", "bf16")])
def test_precision_is_that_of_params_and_not_of_accelerate(build, compute_dtype, precision):
    trainer = build(compute=changed(COMPUTE, compute_dtype=compute_dtype))

    assert os.environ["ACCELERATE_MIXED_PRECISION"] == precision
    assert trainer.accelerator.mixed_precision == precision


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16")
def test_precision_on_a_cpu_is_float32(build):
    assert build(compute=changed(COMPUTE, compute_dtype="auto")).accelerator.mixed_precision == "no"


# a probe


def test_probe_takes_its_steps_and_leaves_nothing_behind(build, tmp_path):
    train = changed(TRAIN, save_steps=1, report_to="wandb")

    trainer = trained(build(train=train, max_steps=3))

    assert trainer.state.global_step == 3
    assert not list(tmp_path.glob("checkpoints/*"))
    assert not any("wandb" in type(callback).__name__.lower() for callback in trainer.callback_handler.callbacks)


# validation


def test_validation_loss_is_nats_a_token(build):
    trainer = build(validation_windows=LOOKS)
    trainer.train()

    metrics = trainer.evaluate()

    nats = nats_per_document(trainer.forward, LOOKS, num_documents=3, per_device_batch=3)
    assert metrics["eval_loss"] == pytest.approx(nats.sum() / (50 + 9 + 70), rel=1e-6)
    assert logged(trainer, "eval_loss")[-1] == metrics["eval_loss"]


def test_validation_runs_before_the_first_step_and_every_eval_steps(build):
    trainer = trained(build(validation_windows=LOOKS))

    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert steps == [0, 2, 4]


def test_validation_leaves_train_mode_and_the_random_stream_alone(build):
    trainer = build(validation_windows=LOOKS)
    trainer.model.train()
    stream = torch.get_rng_state()

    trainer.evaluate()

    assert all(module.training for module in trainer.model.modules())
    assert torch.equal(torch.get_rng_state(), stream)


def test_validation_does_not_change_the_adapter(build):
    with_validation = trained(build(validation_windows=LOOKS, train=changed(TRAIN, eval_steps=1)))
    without = trained(build())

    assert same(trainable(with_validation.model), trainable(without.model))


def test_collate_stacks_rows():
    rows = Sequences(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, IGNORED]]))

    batch = collate([rows[0], rows[1]])

    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2], [3, 4]],
        "labels": [[1, 2], [3, IGNORED]],
    }
