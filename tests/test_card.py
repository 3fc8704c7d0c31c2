"""The model card of the adapter."""

import ast

import pytest
from example_run import write_run
from helpers import REPOSITORY
from ruamel.yaml import YAML
from tiny_meta import rewrite_json

from pdf2lora.params import read_params
from pdf2lora.report.card import render_card
from pdf2lora.report.results import read_results


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path)


def card_of(project, **arguments):
    params = read_params(REPOSITORY / "params.yaml")
    return render_card(read_results(project / "models/source/demo", []), params, **arguments)


def test_has_perplexities_settings_and_licence(project):
    card = card_of(project)

    assert YAML(typ="safe").load(card.split("---\n")[1])["library_name"] == "peft"
    assert "| base in 4 bits with the adapter | 15.00 | 14.90 to 15.10 |" in card
    assert "25.0%" in card
    assert "| lora.target_modules | q_proj, k_proj, v_proj, o_proj |" in card
    assert "LICENSE.txt" in card


def test_a_worse_adapter_raises_the_perplexity(project):
    worse = {"share": -0.085, "low_95": -0.1, "high_95": -0.07}
    rewrite_json(project / "metrics/eval.json", improvement=worse, improvement_over_unquantized=worse)

    card = card_of(project)

    assert "The adapter raises the perplexity of the 4-bit base by 8.5% (95% interval: 7.0% to 10.0%)." in card
    assert "Compared with the unquantized base, it is higher by 8.5% (7.0% to 10.0%)." in card


def test_names_a_missing_licence(project):
    (project / "models/source/demo/LICENSE.txt").unlink()

    assert "`models/source/demo` has no licence file" in card_of(project)


def test_the_snippet_is_python(project):
    for is_merged in (False, True):
        snippet = card_of(project, is_merged=is_merged).split("```python\n")[1].split("```")[0]

        ast.parse(snippet)
        assert "models/base" not in snippet
