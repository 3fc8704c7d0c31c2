"""compare's table and verdicts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import compare

BEFORE = {f"{n}.pdf": (1000.0, 50.0 + n) for n in range(30)}


def scaled(*factors):
    return {name: (t, p * factors[n % len(factors)]) for n, (name, (t, p)) in enumerate(BEFORE.items())}


class TestChange:
    @pytest.mark.parametrize(
        ("after", "shown", "verdict"),
        [
            (scaled(0.9), "-10.0%", "better"),
            (scaled(1.1), "+10.0%", "worse"),
            (scaled(0.8, 1.25), "+0.0%", "no difference"),
            (scaled(1.0), "+0.0%", "the same"),
        ],
    )
    def test_says_whether_documents_tell_two_models_apart(self, after, shown, verdict):
        share, interval, said = compare.change(BEFORE, after, 500)

        assert said == verdict
        assert share.lstrip("+-") == shown.lstrip("+-")
        low, high = (float(number) for number in re.findall(r"[+-][\d.]+", interval))
        assert low <= float(share.rstrip("%")) <= high

    def test_other_tokens_do_not_compare(self):
        assert compare.change(BEFORE, {"0.pdf": (999.0, 50.0)}, 500) == ("", "", "other test text")

    def test_an_experiment_without_results_does_not_compare(self):
        assert compare.change(BEFORE, {}, 500) == ("", "", "")


COMMIT = {
    "rev": "a1b2c3d",
    "State": None,
    "adapted.perplexity": 100.0,
    "lora.r": 8.0,
    "train.seed": 0.0,
    "train.loss": 4.0,
}
EXPERIMENT = {"rev": "e4f5a6b", "Experiment": "bony-tars", "State": "Success", "adapted.perplexity": 90.0}


class TestTable:
    @pytest.fixture
    def shown(self, tmp_path, monkeypatch, write_params, capsys):
        write_params()
        monkeypatch.chdir(tmp_path)

        def run(*experiments, width=100):
            monkeypatch.setattr(compare.dvc.api, "exp_show", lambda: [COMMIT, COMMIT, *experiments])
            monkeypatch.setattr(
                compare,
                "read_documents",
                lambda row: scaled(row["adapted.perplexity"] / 100) if row["State"] in (None, "Success") else {},
            )
            monkeypatch.setenv("COLUMNS", str(width))
            compare.main()
            return capsys.readouterr().out.splitlines()

        return run

    def test_names_what_differs_in_params_and_nothing_else(self, shown):
        lines = shown(EXPERIMENT | {"lora.r": 16.0, "train.seed": 0.0, "train.loss": 3.0})

        assert lines[1].split() == ["commit", "a1b2c3d", "100.00"]
        assert re.fullmatch(r"bony-tars +90\.00 +-10\.0% +\[-10\.0%, -10\.0%\] +better +lora\.r=16", lines[2])

    def test_lists_are_short(self):
        assert compare.value("['q_proj', 'v_proj']") == "[q v]"
        assert compare.value(0.0005) == "0.0005"
        assert compare.value("True") == "true"

    def test_fits_the_terminal(self, shown):
        lines = shown(EXPERIMENT | {"lora.r": 16.0, "train.seed": 12345678901234567890.0}, width=80)

        assert max(map(len, lines)) <= 80
        assert lines[2].endswith("…")

    def test_nothing_is_cut_where_there_is_no_terminal(self, shown, monkeypatch):
        monkeypatch.setattr(sys, "__stdout__", None)
        modules = "['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']" * 3

        lines = shown(EXPERIMENT | {"lora.r": modules}, width="")

        assert lines[2].endswith(compare.value(modules))

    @pytest.mark.parametrize("state", ["Queued", "Running", "Failed"])
    def test_an_experiment_without_results_says_so(self, shown, state):
        lines = shown(EXPERIMENT | {"State": state, "lora.r": 16.0})

        assert lines[2].split() == ["bony-tars", state, "lora.r=16"]

    def test_without_experiments_it_says_how_to_run_one(self, shown):
        with pytest.raises(SystemExit) as stopped:
            shown()

        assert "there are none of this commit; run one, such as dvc exp run -S lora.r=16" in str(stopped.value)


def test_documents_are_read_from_an_experiment_s_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("metrics").mkdir()
    Path(compare.DOCUMENTS).write_text("id,tokens,adapted_perplexity\na.pdf,7,2.5\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)

    assert compare.read_documents({"rev": "HEAD", "State": None}) == {"a.pdf": (7.0, 2.5)}
    assert compare.read_documents({"rev": "HEAD", "State": "Running"}) == {}
    assert compare.read_documents({"rev": "no-such-rev", "State": "Success"}) == {}
