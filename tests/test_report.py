"""report: its outputs."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from example_run import write_machine, write_run
from helpers import REPOSITORY
from ruamel.yaml import YAML

from pdf2lora.report.figures import documents, over_steps
from stages import report


def two_figures(results):
    return {"loss": over_steps("Loss", "nats", results.curves), "documents": documents(results.test_documents)}


@pytest.fixture
def run(tmp_path, monkeypatch, write_params):
    """Writes a run to tmp_path and its report with two figures: run(num_test=30)."""
    write_params()
    monkeypatch.setattr(report, "result_figures", two_figures)
    monkeypatch.chdir(tmp_path)
    for name in ("data/tokens", "models/base", "models/adapter"):  # the report has their hashes only
        (tmp_path / name).mkdir(parents=True)

    def make(**details: object) -> str:
        write_run(tmp_path, **details)
        report.main()
        return Path("reports/index.html").read_text(encoding="utf-8")

    return make


def test_measurements_do_not_change_the_outputs(run, tmp_path):
    outputs = [
        "index.html",
        "model_card.md",
        *(f"figures/{n}.{e}" for n in ("loss", "documents") for e in ("svg", "png")),
    ]
    run()
    contents = {name: Path("reports", name).read_bytes() for name in outputs}
    write_machine(tmp_path)

    report.main()

    assert {name: Path("reports", name).read_bytes() for name in outputs} == contents


def test_figures_are_files_too(run):
    run()

    for file in Path("reports/figures").glob("*.svg"):
        assert ET.parse(file).getroot().tag.endswith("svg")
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "prefers-color-scheme: dark" in file.read_text(encoding="utf-8")
    assert {file.stem for file in Path("reports/figures").glob("*.png")} == {"loss", "documents"}


def test_dvc_yaml_has_the_outputs_without_the_machine_page():
    pipeline = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))

    assert pipeline["stages"]["report"]["outs"] == ["reports/figures", "reports/index.html", "reports/model_card.md"]


def test_writes_the_machine_page(run, tmp_path):
    write_run(tmp_path)
    write_machine(tmp_path)

    report.main()

    assert "34,567" in Path("reports/machine.html").read_text(encoding="utf-8")


def test_a_run_without_params_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit) as stopped:
        report.main()

    assert str(stopped.value).startswith("error: params.yaml")
