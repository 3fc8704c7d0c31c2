"""When numbers of the previous run count."""

import pytest

from pdf2lora.params import read_params
from pdf2lora.preflight.previous_run import PreviousRun


@pytest.fixture
def params(write_params):
    return read_params(write_params())


def run_with(params, stage, locked=None, dep=None):
    """dep: a folder with one file of two bytes."""
    deps = [{"path": dep, "md5": "0", "size": 2, "nfiles": 1}] if dep else []
    entry = {"params": {"params.yaml": locked or {}}, "deps": deps}
    return PreviousRun(params, stages={stage: entry}, machine={}, batch={})


def test_same_params(params):
    current = {"lora": params.lora.model_dump(), "train.optim": params.train.optim}

    assert run_with(params, "train", current).ran_with_same_params("train")
    assert not run_with(params, "train", current | {"train.optim": "adamw_torch"}).ran_with_same_params("train")
    assert not run_with(params, "train", current | {"train.gone": 1}).ran_with_same_params("train")
    assert not run_with(params, "train", current).ran_with_same_params("find_batch")


def test_the_base_is_current_if_convert_read_this_source_model(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "models/source" / params.model
    (source / ".cache").mkdir(parents=True)
    (source / ".cache/times").write_text("DVC ignores this file")
    (source / "config.json").write_text("{}")

    assert run_with(params, "convert", dep=f"models/source/{params.model}").has_current_base
    assert not run_with(params, "convert", dep="models/source/other").has_current_base

    (source / "tokenizer.json").touch()
    assert not run_with(params, "convert", dep=f"models/source/{params.model}").has_current_base

    (source / "tokenizer.json").unlink()
    (source / "config.json").write_text('{"a": 1}')
    assert not run_with(params, "convert", dep=f"models/source/{params.model}").has_current_base


def test_same_sequence_length(params):
    assert run_with(params, "train", {"compute": params.compute.model_dump()}).ran_with_same_seq_length
    assert not run_with(params, "train", {"compute": {"seq_length": 8}}).ran_with_same_seq_length


def test_no_previous_run(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    previous = PreviousRun.read(params)

    assert not previous.has_current_text
    assert not previous.has_current_base
    assert (previous.machine, previous.batch) == ({}, {})
