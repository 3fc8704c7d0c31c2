"""evaluate on a tiny model."""

import csv
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import prose
from tiny_llama import quiet, write_split

from pdf2lora.evaluation import job, unquantized
from pdf2lora.model import kernel_choice
from pdf2lora.model.forward import build_forward
from pdf2lora.runtime.manifest import MANIFEST
from stages import evaluate

pytestmark = quiet
GENERAL = [prose(seed, 20) for seed in (20, 21, 22)]
TEXTS = ["short", prose(11, 30), prose(12, 15)]
SETTINGS = {
    "compute.seq_length": 32,
    "sample.prompt_tokens": 8,
    "sample.max_new_tokens": 8,
    "evaluate.stride": 12,
    "evaluate.per_device_batch": 4,
}


@pytest.fixture
def project(tmp_path, monkeypatch, write_params, models):
    """The files of a project after train. `run` runs evaluate with changed settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", "")
    monkeypatch.delenv("DVC_ROOT")
    shutil.copytree(models, tmp_path / "models")
    write_split(tmp_path, "test", TEXTS, models / "base")
    (tmp_path / "data/general").mkdir()
    for number, text in enumerate(GENERAL):
        (tmp_path / f"data/general/{number}.txt").write_text(text)

    def run(**changes):
        write_params(SETTINGS | {f"evaluate.{name}": value for name, value in changes.items()})
        evaluate.main()
        return read_metrics()

    return SimpleNamespace(run=run)


def read_metrics():
    return json.loads(Path("metrics/eval.json").read_text(encoding="utf-8"))


def read_rows():
    with Path("metrics/eval_documents.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def all_numbers(metrics):
    numbers = [value for name in ("base_unquantized", "base", "adapted") for value in metrics[name].values()]
    return numbers + [float(value) for row in read_rows() for key, value in row.items() if key != "id"]


def test_writes_both_perplexities_and_a_row_for_each_document(project, capsys):
    metrics = project.run()

    names = ("base_unquantized", "base", "adapted", "improvement")
    unquantized, base, adapted, improvement = (metrics[name] for name in names)
    assert metrics["documents"] == len(TEXTS)
    assert metrics["tokens"] == sum(len(text) for text in TEXTS)
    for numbers in (unquantized, base, adapted):
        assert numbers["low_95"] <= numbers["perplexity"] <= numbers["high_95"]
        assert numbers["bits_per_byte"] == pytest.approx(
            math.log2(numbers["perplexity"]), abs=1e-4
        )  # one token per byte
    assert improvement["share"] == pytest.approx(1 - adapted["perplexity"] / base["perplexity"], abs=2e-5)
    cost = base["perplexity"] / unquantized["perplexity"] - 1
    assert metrics["quantization_cost"]["share"] == pytest.approx(cost, abs=1e-4)
    assert metrics["general"]["documents"] == len(GENERAL)

    rows = read_rows()
    assert [row["id"] for row in rows] == ["test-0.pdf", "test-1.pdf", "test-2.pdf"]
    assert [int(row["words"]) for row in rows] == [len(text.split()) for text in TEXTS]
    for name in ("base", "adapted"):
        nats = sum(int(row["tokens"]) * math.log(float(row[f"{name}_perplexity"])) for row in rows)
        assert math.exp(nats / metrics["tokens"]) == pytest.approx(metrics[name]["perplexity"], rel=1e-5)
    assert f"{base['perplexity']:.2f} (base) -> {adapted['perplexity']:.2f} (adapted)" in capsys.readouterr().out
    assert json.loads(Path("metrics/machine.json").read_text()).keys() == {"machine", "evaluate"}


def test_batch_size_does_not_change_the_numbers(project):
    first, second = (all_numbers(project.run(per_device_batch=batch)) for batch in (1, 4))

    assert first == pytest.approx(second, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize(("chosen", "built"), [("reference", "reference"), ("fused", "fused"), ("fp8", "fused")])
def test_scores_are_not_computed_in_fp8(project, monkeypatch, chosen, built):
    kernels_of_forward = []

    def build(model, kernels):
        kernels_of_forward.append(kernels)
        return build_forward(model, "reference")

    monkeypatch.setattr(kernel_choice, "choose_kernels", lambda *settings: chosen)
    monkeypatch.setattr(job, "build_forward", build)

    project.run(unquantized_base=False)

    assert set(kernels_of_forward) == {built}


@pytest.fixture
def forwards(monkeypatch):
    """The kernels of each forward pass that evaluate builds."""
    built = []

    def build(model, kernels):
        built.append(kernels)
        return build_forward(model, kernels)

    for module in (job, unquantized):
        monkeypatch.setattr(module, "build_forward", build)
    return built


def results():
    return [
        Path(name).read_bytes() for name in ("metrics/eval.json", "metrics/eval_documents.csv", "data/samples.json")
    ]


def test_a_second_adapter_does_not_score_the_base_again(project, forwards, capsys):
    project.run()
    expected = results()
    assert len(forwards) == 3  # unquantized, base, adapted
    forwards.clear()

    project.run()

    assert len(forwards) == 1
    assert results() == expected
    assert "evaluate: an earlier run has scored the base model\n" in capsys.readouterr().out


def change_general_text():
    Path("data/general/0.txt").write_text(prose(23, 20))


def change_base():
    manifest = Path("models/base") / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (change_general_text, {}),
        (change_base, {}),
        (lambda: None, {"stride": 16}),
        (lambda: None, {"unquantized_base": False}),
    ],
    ids=["general text", "base", "stride", "unquantized base"],
)
def test_other_inputs_score_the_base_again(project, forwards, change, settings):
    project.run()
    forwards.clear()
    change()

    project.run(**settings)

    assert len(forwards) == 3 - ("unquantized_base" in settings)


def test_compares_with_an_earlier_commit(project, capsys):
    assert "comparison" not in project.run()
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "metrics/eval_documents.csv"], ["commit", "-q", "-m", "earlier"]):
        subprocess.run([*git, *command], check=True)
    capsys.readouterr()

    metrics = project.run(compare_to="HEAD")

    comparison = metrics["comparison"]
    assert (comparison["baseline"], comparison["documents"], comparison["unpaired_documents"]) == ("HEAD", 3, 0)
    assert comparison["current_perplexity"] == pytest.approx(metrics["adapted"]["perplexity"], rel=1e-5)
    assert (comparison["improvement"]["share"], comparison["significant"]) == (0, False)
    assert "evaluate: baseline adapter HEAD (" in capsys.readouterr().out


def test_an_unknown_baseline_is_refused_before_scoring(project):
    with pytest.raises(SystemExit, match="'nowhere' is not a git revision"):
        project.run(compare_to="nowhere")

    assert not Path("metrics/eval.json").exists()


def test_writes_samples(project):
    project.run()

    samples = json.loads(Path("data/samples.json").read_text(encoding="utf-8"))
    assert [sample["document"] for sample in samples] == ["test-0.pdf", "test-1.pdf", "test-2.pdf"]


def test_the_unquantized_base_is_scored_only_where_the_setting_asks_for_it(project):
    assert "base_unquantized" not in project.run(unquantized_base=False)


def test_missing_inputs_are_reported_in_one_line(project):
    Path("data/split/test.jsonl").unlink()

    with pytest.raises(SystemExit, match=r"error: data/split/test\.jsonl does not exist"):
        project.run()
