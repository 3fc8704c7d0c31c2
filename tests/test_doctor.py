"""doctor: problems, forecasts and their sources."""

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from helpers import REPOSITORY, prose
from ruamel.yaml import YAML
from tiny_llama import write_split, write_tiny_llama
from tiny_pdfs import write_pdf

from commands import doctor
from pdf2lora.model import quantization
from pdf2lora.preflight import environment
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.findings import Finding

H100 = Gpu("NVIDIA H100 80GB HBM3", "570.10", 79.6, 9.0)


@pytest.fixture
def project(tmp_path, monkeypatch, write_params):
    """A fresh clone: two PDFs of two pages, a source model in Meta's layout, no outputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "find_gpus", lambda: [])
    subprocess.run(["git", "init", "--quiet"], check=True)
    write_params()
    shutil.copytree(REPOSITORY / "models/source/demo", "models/source/demo")
    shutil.copy(REPOSITORY / "requirements.txt", tmp_path)
    for name in ("one.pdf", "sub/two.PDF"):
        write_pdf(tmp_path / "data/pdfs/demo" / name, [prose(1), prose(2)])
    return tmp_path


@pytest.fixture
def after_a_run(project, write_params):
    """The project after `dvc repro`."""
    write_tiny_llama(project / "models/base")
    write_split(project, "train", ["x" * 1000, "y" * 500], project / "models/base")
    write_params({"compute.seq_length": 64, "evaluate.stride": 64})
    params = YAML(typ="safe").load((project / "params.yaml").read_text())

    def size_of(dep):
        sizes = [file.stat().st_size for file in (project / dep).rglob("*") if file.is_file()]
        return {"size": sum(sizes), "nfiles": len(sizes)}

    def stage(sections, *deps):
        locked = {section: params[section] for section in sections}
        return {"params": {"params.yaml": locked}, "deps": [{"path": dep, "md5": "0"} | size_of(dep) for dep in deps]}

    lock = {
        "extract": stage(["extract"], "data/pdfs/demo"),
        "split": stage(["split"]) | {"outs": [{"path": "data/split", "md5": "0"}, {"path": "metrics/split.json"}]},
        "convert": stage(["convert"], "models/source/demo"),
        "tokenize": stage([], "data/split"),
        "find_batch": stage(["compute", "find_batch", "lora", "quantization"]),
        "train": stage(["compute", "train"]),
    }
    tokenizer = "models/base/tokenizer.json"
    md5 = hashlib.md5((project / tokenizer).read_bytes()).hexdigest()
    lock["tokenize"]["deps"].append({"path": tokenizer, "md5": md5})
    YAML(typ="safe").dump({"stages": lock}, project / "dvc.lock")
    (project / "metrics").mkdir()
    (project / "metrics/split.json").write_text('{"train": {"characters": 1500}}')
    probes = [
        {"gradient_checkpointing": "full", "batch": 4, "fits": True, "peak_gib": 0.2},
        {"gradient_checkpointing": "none", "batch": 4, "fits": True, "peak_gib": 0.9},
    ]
    batch = {
        "device": "cpu",
        "budget_gib": 1,
        "gradient_checkpointing": "full",
        "per_device_batch": 4,
        "probes": probes,
    }
    (project / "metrics/batch.json").write_text(json.dumps(batch))
    machine = {"machine": {"gpu": None}, "train": {"seconds": 9, "tokens_per_s": 16}, "evaluate": {"seconds": 3.0}}
    (project / "metrics/machine.json").write_text(json.dumps(machine))
    return project


def printed(capsys, status=None):
    if status is None:
        doctor.main()
    else:
        with pytest.raises(SystemExit) as stopped:
            doctor.main()
        assert stopped.value.code == status
    return capsys.readouterr().out


class TestDoctor:
    def test_before_the_first_run_it_estimates(self, project, capsys):
        output = printed(capsys)

        assert "data/pdfs/demo: 2 PDFs" in output
        assert "Meta's layout" in output
        assert "estimated: 4 pages (pdfium), 2,900 characters per page, 4 per token, 85% for training" in output
        assert "sequences  5 of 512 tokens" in output
        assert "steps      2 optimizer steps" in output
        assert "computed: base in 4 bits, 71,680 LoRA parameters; find_batch measures the rest" in output
        assert "estimated: training alone: 10 GFLOP/s per core" in output
        assert "computed: 2 x 0.01 GiB: models/base and its copy in DVC's cache" in output

    @pytest.mark.parametrize(
        ("types", "copies"), [("hardlink,copy", 1), ("symlink", 1), ("copy", 2), ("reflink,copy", 2)]
    )
    def test_links_to_the_cache_need_no_second_copy(self, project, capsys, types, copies):
        Path(".dvc").mkdir(exist_ok=True)
        Path(".dvc/config.local").write_text(f"[cache]\n    type = {types}\n")

        output = printed(capsys)

        text = (
            "0.01 GiB: models/base, linked to DVC's cache" if copies == 1 else "2 x 0.01 GiB: models/base and its copy"
        )
        assert f"computed: {text}" in output

    def test_after_a_run_it_measures(self, after_a_run, capsys):
        output = printed(capsys)

        assert "sequences  24 of 64 tokens" in output  # 1504 bytes, with BOS and EOS
        assert "counted: data/tokens/train.npy" in output
        assert "steps      6 optimizer steps" in output
        assert "up to 0.20 GiB for 4 sequences" in output
        assert (
            "time       2 minutes\n             measured: train ran at 16 tokens/s; other stages: evaluate 3 s"
            in output
        )
        assert "computed: models/base exists" in output

    def test_a_run_of_another_corpus_or_model_does_not_count(self, after_a_run, capsys):
        shutil.copytree("data/pdfs/demo", "data/pdfs/other")
        shutil.copytree("models/source/demo", "models/source/llama_1b")
        text = (after_a_run / "params.yaml").read_text()
        (after_a_run / "params.yaml").write_text(text.replace('corpus: "demo"', "corpus: other"))

        assert "estimated: 4 pages (pdfium)" in printed(capsys)

        (after_a_run / "params.yaml").write_text(text.replace('model: "demo"', "model: llama_1b"))

        output = printed(capsys)
        assert "1,500 characters in data/split/train.jsonl, 4 per token" in output
        assert "measured" not in output

    def test_a_run_with_other_pdfs_does_not_count(self, after_a_run, capsys):
        write_pdf(after_a_run / "data/pdfs/demo/three.pdf", [prose(3)])

        assert "estimated: 5 pages (pdfium)" in printed(capsys)

    @pytest.mark.parametrize("changed", ["data/split", "models/base/tokenizer.json"])
    def test_tokens_of_another_text_or_tokenizer_do_not_count(self, after_a_run, capsys, changed):
        yaml = YAML(typ="safe")
        lock = yaml.load((after_a_run / "dvc.lock").read_text())
        for dep in lock["stages"]["tokenize"]["deps"]:
            dep["md5"] = "1" if dep["path"] == changed else dep["md5"]
        yaml.dump(lock, after_a_run / "dvc.lock")

        assert "estimated: 1,500 characters in data/split/train.jsonl, 4 per token" in printed(capsys)

    @pytest.mark.parametrize(
        ("before", "now", "known"),
        [("learning_rate: 0.0005", "learning_rate: 0.002", True), ("seq_length: 64", "seq_length: 128", False)],
    )
    def test_a_batch_search_with_the_same_params_gives_the_memory(self, after_a_run, capsys, before, now, known):
        text = (after_a_run / "params.yaml").read_text()
        assert text.count(before) == 1
        (after_a_run / "params.yaml").write_text(text.replace(before, now))

        assert ("up to 0.20 GiB for 4 sequences" in printed(capsys)) == known

    def test_a_run_on_another_gpu_does_not_count(self, after_a_run, capsys, monkeypatch):
        monkeypatch.setattr(environment, "find_gpus", lambda: [H100])
        monkeypatch.setattr(environment, "torch_build", lambda gpus: Finding("ok", "torch", "built for CUDA"))

        output = printed(capsys)

        assert "NVIDIA H100 80GB HBM3, 80 GiB, driver 570.10" in output
        assert "estimated: training alone: 30% of 989 TFLOP/s" in output

    def test_the_licence_is_named(self, project, capsys):
        (project / "models/source/demo/LICENSE").touch()

        assert "ok       licence       LICENSE in models/source/demo" in printed(capsys)

    @pytest.mark.parametrize(
        ("file", "words"),
        [
            ("params.json", "/params.json: the file is missing."),
            ("tokenizer.model", "/tokenizer.model: the file is missing."),
            ("consolidated.00.pth", "/consolidated.00.pth: the file is missing."),
        ],
    )
    def test_a_missing_file_of_the_source_model_is_a_problem(self, project, capsys, file, words):
        (project / "models/source/demo" / file).unlink()

        output = printed(capsys, status=1)

        assert f"problem  source model  models/source/demo{words}" in output
        assert "forecast" not in output

    def test_meta_s_files_in_the_hub_s_subfolder_must_be_copied(self, project, capsys):
        folder = project / "models/source/demo"
        folder.rename(project / "original")
        folder.mkdir()
        (project / "original").rename(folder / "original")

        output = printed(capsys, status=1)
        assert (
            "problem  source model  models/source/demo: the model's files are in models/source/demo/original" in output
        )
        assert "cp -L models/source/demo/original/* models/source/demo\n" in output

    def test_a_corpus_without_pdfs_is_a_problem(self, project, capsys):
        shutil.rmtree("data/pdfs/demo")
        Path("data/pdfs/demo").mkdir()

        assert "problem  corpus        data/pdfs/demo has no file that ends in .pdf" in printed(capsys, status=1)

    def test_a_corpus_without_a_readable_page_is_a_problem(self, project, capsys):
        for name in ("one.pdf", "sub/two.PDF"):
            (project / "data/pdfs/demo" / name).write_bytes(b"not a PDF")

        assert "problem  corpus        pdfium can read no page of data/pdfs/demo." in printed(capsys, status=1)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"corpus": "demmo"}, "error: corpus: 'demmo' must be a folder of data/pdfs (existing ones: demo)"),
            ({"lora.r": 0}, "error: lora.r is 0; it must be greater than or equal to 1"),
        ],
    )
    def test_invalid_params_end_it(self, project, write_params, changes, words):
        write_params(changes)

        with pytest.raises(SystemExit) as stopped:
            doctor.main()

        assert str(stopped.value).startswith(words)

    def test_does_not_import_torch(self, start_python):
        process = start_python(
            "import sys, commands.doctor; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
        )

        assert process.communicate()[0] == "[]\n"

    def test_auto_is_unknown_before_find_batch(self, project, write_params, capsys):
        write_params({"train.effective_batch": "auto"})

        assert "unknown: train.effective_batch is auto: find_batch chooses it" in printed(capsys)


class TestFourBitWeights:
    """doctor checks the widths as train does. It does not import torch if the check cannot fail."""

    @pytest.fixture
    def of_width(self, project):
        def of_width(width):
            shutil.rmtree("models/source/demo")
            write_tiny_llama(project / "models/source/demo", hidden_size=width, max_position_embeddings=512)

        return of_width

    def test_a_wrong_round_trip_is_a_problem(self, of_width, capsys, monkeypatch):
        of_width(96)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        zeros = lambda packed, state: torch.zeros(state.shape, dtype=state.dtype)  # noqa: E731
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", zeros)

        output = printed(capsys, status=1)
        assert re.search("problem  4-bit weights .*96", output)

    def test_a_correct_round_trip_is_ok(self, of_width, capsys, monkeypatch):
        of_width(96)
        calls = []
        monkeypatch.setattr(quantization, "check_4bit_round_trip", lambda *arguments: calls.append(arguments))

        assert "ok       4-bit weights this machine reads them back correctly\n" in printed(capsys)
        assert calls == [({96, 128}, "nf4", torch.float32)]

    @pytest.mark.parametrize(
        ("width", "bits", "gpus"), [(64, 4, []), (96, 8, []), (96, 16, []), (96, 4, [H100])], ids=str
    )
    def test_torch_is_not_imported_if_the_check_cannot_fail(
        self, of_width, capsys, monkeypatch, write_params, width, bits, gpus
    ):
        of_width(width)
        write_params({"quantization.bits": bits})
        monkeypatch.setattr(environment, "find_gpus", lambda: gpus)
        for check in ("torch_build", "bitsandbytes"):
            monkeypatch.setattr(environment, check, lambda *_: Finding("ok", "library", "exists"))
        monkeypatch.setitem(sys.modules, "pdf2lora.model.quantization", None)  # an import would fail

        assert "4-bit weights" not in printed(capsys)


def test_it_takes_less_than_two_processor_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    output = subprocess.run([sys.executable, "-m", "commands.doctor"], cwd=REPOSITORY, capture_output=True, text=True)

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "forecast of this run" in output.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
