"""compare: the rows and verdicts of its table."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from commands import compare

COMMIT = {
    "rev": "a1b2c3d",
    "State": None,
    "adapted.perplexity": 100.0,
    "lora.r": 8.0,
    "train.seed": 0.0,
    "train.loss": 4.0,
}
EXPERIMENT = {"rev": "e4f5a6b", "Experiment": "bony-tars", "State": "Success", "adapted.perplexity": 90.0}


def table(*factors: float, num_documents: int = 30) -> pd.DataFrame:
    """metrics/eval_documents.csv with the perplexities 50, 51, ... times the factors."""
    perplexities = [(50.0 + n) * factors[n % len(factors)] for n in range(num_documents)]
    return pd.DataFrame(
        {
            "id": [f"{n}.pdf" for n in range(num_documents)],
            "bytes": 4000,
            "tokens": 1000,
            "adapted_perplexity": perplexities,
        }
    )


@pytest.mark.parametrize(
    ("current", "improvement", "verdict"),
    [
        (table(0.9), "+10.0%", "better"),
        (table(1.1), "-10.0%", "worse"),
        (table(0.8, 1.25), "+0.0%", "not significant"),
        (table(1.0), "+0.0%", "same"),
    ],
)
def test_improvement_and_verdict(current, improvement, verdict):
    cells = compare.improvement_cells(current, table(1.0))

    assert (cells[0], cells[2]) == (improvement, verdict)
    low, high = (float(number) for number in re.findall(r"[+-][\d.]+", cells[1]))
    assert low <= float(improvement.rstrip("%")) <= high


def test_other_test_documents_are_not_compared():
    assert compare.improvement_cells(table(0.9, num_documents=31), table(1.0)) == (
        "",
        "",
        "other test documents",
    )


def test_an_experiment_without_results_is_not_compared():
    assert compare.improvement_cells(None, table(1.0)) == ("", "", "")


def test_one_document_gives_no_verdict():
    cells = compare.improvement_cells(table(0.9, num_documents=1), table(1.0, num_documents=1))

    assert cells == ("+10.0%", "none", "too few documents")


def test_an_improvement_below_the_seed_noise_has_its_own_verdict():
    assert compare.improvement_cells(table(0.99), table(1.0), noise=0.02)[2] == "within seed noise"
    assert compare.improvement_cells(table(0.9), table(1.0), noise=0.02)[2] == "better"


def test_seed_noise_is_the_largest_difference_between_seeds():
    def run(perplexity, seed, rank=8):
        return {"adapted.perplexity": perplexity, "train.seed": seed, "lora.r": rank}

    settings = ["lora.r", "train.seed"]
    assert compare.seed_noise([run(100.0, 0), run(102.0, 1), run(90.0, 0, rank=16)], settings) == pytest.approx(0.02)
    assert compare.seed_noise([run(100.0, 0), run(90.0, 0, rank=16)], settings) is None


class TestTable:
    @pytest.fixture
    def print_table(self, tmp_path, monkeypatch, write_params, capsys):
        write_params()
        monkeypatch.chdir(tmp_path)

        def run(*experiments, width=100):
            monkeypatch.setattr(compare.dvc.api, "exp_show", lambda: [COMMIT, COMMIT, *experiments])
            monkeypatch.setattr(
                compare,
                "read_table",
                lambda row: table(row["adapted.perplexity"] / 100) if row["State"] in (None, "Success") else None,
            )
            monkeypatch.setenv("COLUMNS", str(width))
            compare.main()
            return capsys.readouterr().out.splitlines()

        return run

    def test_lists_changed_settings_only(self, print_table):
        lines = print_table(EXPERIMENT | {"lora.r": 16.0, "train.seed": 0.0, "train.loss": 3.0})

        assert lines[1].split() == ["commit", "a1b2c3d", "100.00"]
        assert re.fullmatch(r"bony-tars +90\.00 +\+10\.0% +\[\+10\.0%, \+10\.0%\] +better +lora\.r=16", lines[2])

    def test_settings_are_short(self):
        assert compare.format_setting("['q_proj', 'v_proj']") == "[q v]"
        assert compare.format_setting(0.0005) == "0.0005"
        assert compare.format_setting("True") == "true"

    def test_rows_are_cut_at_the_width_of_the_terminal(self, print_table):
        lines = print_table(EXPERIMENT | {"lora.r": 16.0, "train.seed": 12345678901234567890.0}, width=80)

        assert max(map(len, lines)) <= 80
        assert lines[2].endswith("…")

    def test_rows_are_not_cut_without_a_terminal(self, print_table, monkeypatch):
        monkeypatch.setattr(sys, "__stdout__", None)
        modules = "['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']" * 3

        lines = print_table(EXPERIMENT | {"lora.r": modules}, width="")

        assert lines[2].endswith(compare.format_setting(modules))

    @pytest.mark.parametrize("state", ["Queued", "Running", "Failed"])
    def test_an_experiment_without_results_has_its_state(self, print_table, state):
        lines = print_table(EXPERIMENT | {"State": state, "lora.r": 16.0})

        assert lines[2].split() == ["bony-tars", state, "lora.r=16"]

    def test_a_commit_without_experiments_is_an_error(self, print_table):
        with pytest.raises(SystemExit) as stopped:
            print_table()

        assert str(stopped.value).startswith("error: This commit has no experiments.")


def test_the_table_comes_from_the_commit_of_a_finished_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("metrics").mkdir()
    compare.EVAL_DOCUMENTS.write_text("id,bytes,tokens,adapted_perplexity\na.pdf,9,7,2.5\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)

    assert compare.read_table({"rev": "HEAD", "State": None})["adapted_perplexity"].tolist() == [2.5]
    assert compare.read_table({"rev": "HEAD", "State": "Running"}) is None
    assert compare.read_table({"rev": "no-such-rev", "State": "Success"}) is None


def test_an_experiment_that_stopped_before_evaluate_is_not_evaluated(monkeypatch):
    row = EXPERIMENT | {"State": "Success"}
    monkeypatch.setattr(compare, "is_evaluated", lambda commit, project: False)

    assert compare.read_table(row) is None
    assert compare.format_perplexity(row, None) == "not evaluated"
