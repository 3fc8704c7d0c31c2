"""doctor: what it finds wrong, what it predicts, and how it says that it knows."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import REPOSITORY, prose, write_pdf
from ruamel.yaml import YAML
from safetensors.torch import load_file
from tiny_adapter import write_tiny_adapter
from tiny_llama import LORA, QUANTIZATION, changed, quiet, write_texts, write_tiny_llama

from commands import doctor
from pdf2lora.model import quantization
from pdf2lora.params import read_params
from pdf2lora.preflight import environment, forecast
from pdf2lora.preflight.environment import Finding, Gpu
from pdf2lora.preflight.forecast import Before, Shape, count_pages, count_tokens, read_shape, steps

H100 = Gpu("NVIDIA H100 80GB HBM3", "570.10", 79.6, 9.0)
T4 = Gpu("Tesla T4", "570.10", 15.0, 7.5)
LLAMA_3B = Shape(28, 3072, 3072, 1024, 8192, 128256, 3_212_749_824, 6_425_499_648)


@pytest.fixture
def project(tmp_path, monkeypatch, write_params):
    """A fresh clone: two PDFs of two pages and a checkpoint in Meta's layout, nothing run yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "find_gpus", lambda: [])
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
    write_texts(project / "data/split/train.jsonl", ["x" * 1000, "y" * 500])
    write_params({"compute.seq_length": 64, "evaluate.stride": 64})
    params = YAML(typ="safe").load((project / "params.yaml").read_text())

    def stage(sections, *deps):
        locked = {section: params[section] for section in sections}
        return {"params": {"params.yaml": locked}, "deps": [{"path": dep, "md5": "0"} for dep in deps]}

    lock = {
        "extract": stage(["extract"], "data/pdfs/demo"),
        "split": stage(["split"]),
        "convert": stage(["convert"], "models/source/demo"),
        "find_batch": stage(["find_batch", "lora", "quantization"]),
        "train": stage(["train"]),
    }
    lock["find_batch"]["params"]["params.yaml"]["compute.seq_length"] = params["compute"]["seq_length"]
    YAML(typ="safe").dump({"stages": lock}, project / "dvc.lock")
    (project / "metrics").mkdir()
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
    def test_before_the_first_run_it_goes_by_rules(self, project, capsys):
        output = printed(capsys)

        assert "data/pdfs/demo: 2 PDFs" in output
        assert "Meta's layout" in output
        assert "rule: 4 pages by pdfium, 2,900 characters a page, 4 a token, 85% to train on" in output
        assert "sequences  5 of 512 tokens" in output
        assert "steps      2 optimizer steps" in output
        assert "computed: base in 4 bits, 71,680 LoRA parameters; find_batch measures the rest" in output
        assert "rule: 10 GFLOP/s a core" in output
        assert "computed: 2 x 0.01 GiB, models/base and DVC's cache" in output

    def test_after_a_run_it_goes_by_that(self, after_a_run, capsys):
        output = printed(capsys)

        assert "sequences  24 of 64 tokens" in output  # 1504 bytes, bos and eos among them
        assert "counted: data/split/train.jsonl with the base's tokenizer" in output
        assert "steps      6 optimizer steps" in output
        assert "up to 0.20 GiB with 4 sequences at a time" in output
        assert "time       2 minutes\n             measured: train ran at 16 tokens/s; beside it evaluate 3 s" in output
        assert "computed: models/base is there" in output

    def test_another_corpus_or_model_is_not_judged_by_the_run_before(self, after_a_run, capsys):
        shutil.copytree("data/pdfs/demo", "data/pdfs/other")
        shutil.copytree("models/source/demo", "models/source/llama_1b")
        text = (after_a_run / "params.yaml").read_text()
        (after_a_run / "params.yaml").write_text(text.replace("corpus: demo", "corpus: other"))

        assert "rule: 4 pages by pdfium" in printed(capsys)

        (after_a_run / "params.yaml").write_text(text.replace("model: demo", "model: llama_1b"))

        output = printed(capsys)
        assert "1,500 characters in data/split/train.jsonl, 4 a token" in output
        assert "measured" not in output

    @pytest.mark.parametrize(
        ("before", "now", "known"),
        [("learning_rate: 0.0005", "learning_rate: 0.002", True), ("seq_length: 64", "seq_length: 128", False)],
    )
    def test_memory_is_known_from_a_batch_search_of_the_same_settings(self, after_a_run, capsys, before, now, known):
        text = (after_a_run / "params.yaml").read_text()
        assert text.count(before) == 1
        (after_a_run / "params.yaml").write_text(text.replace(before, now))

        assert ("up to 0.20 GiB with 4 sequences at a time" in printed(capsys)) == known

    def test_another_gpu_is_not_judged_by_the_run_before(self, after_a_run, capsys, monkeypatch):
        monkeypatch.setattr(environment, "find_gpus", lambda: [H100])

        output = printed(capsys, status=1)

        assert "NVIDIA H100 80GB HBM3, 80 GiB, driver 570.10" in output
        assert "rule: 30% of 989 TFLOP/s" in output

    def test_the_licence_is_named(self, project, capsys):
        (project / "models/source/demo/LICENSE").touch()

        assert "ok       licence       LICENSE in models/source/demo" in printed(capsys)

    @pytest.mark.parametrize(
        ("file", "words"),
        [
            ("params.json", "has neither params.json nor config.json; fetch all its files"),
            ("tokenizer.model", "has no tokenizer.model; fetch all its files"),
            ("consolidated.00.pth", "has no *.pth; fetch all its files"),
        ],
    )
    def test_a_checkpoint_with_a_file_missing_is_a_problem(self, project, capsys, file, words):
        (project / "models/source/demo" / file).unlink()

        output = printed(capsys, status=1)

        assert f"problem  checkpoint    models/source/demo {words}" in output
        assert "this run" not in output

    def test_meta_s_files_where_the_hub_keeps_them_are_to_be_moved(self, project, capsys):
        checkpoint = project / "models/source/demo"
        checkpoint.rename(project / "original")
        checkpoint.mkdir()
        (project / "original").rename(checkpoint / "original")

        words = "models/source/demo has Meta's files in original; mv models/source/demo/original/* models/source/demo\n"
        assert f"problem  checkpoint    {words}" in printed(capsys, status=1)

    def test_a_corpus_without_pdfs_is_a_problem(self, project, capsys):
        shutil.rmtree("data/pdfs/demo")
        Path("data/pdfs/demo").mkdir()

        assert "problem  corpus        data/pdfs/demo holds no file that ends in .pdf" in printed(capsys, status=1)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"corpus": "demmo"}, "error: corpus: 'demmo' must be a folder of data/pdfs (there: demo)"),
            ({"lora.r": 0}, "error: lora.r: 0 must be greater than or equal to 1"),
        ],
    )
    def test_wrong_params_end_it(self, project, write_params, changes, words):
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

        assert "unknown: train.effective_batch is auto: find_batch will tell" in printed(capsys)


class TestWeightsIn4Bits:
    """What train would refuse is foreseen, and torch stays out where that cannot be."""

    @pytest.fixture
    def of_width(self, project):
        def of_width(width):
            shutil.rmtree("models/source/demo")
            write_tiny_llama(project / "models/source/demo", hidden_size=width)

        return of_width

    def test_weights_that_come_back_wrong_are_a_problem(self, of_width, capsys, monkeypatch):
        of_width(96)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        zeros = lambda packed, state: torch.zeros(state.shape, dtype=state.dtype)  # noqa: E731
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", zeros)

        assert (
            "problem  4-bit weights quantization.bits is 4, which does not work here for layers with 96 input "
            f"features: bitsandbytes {bnb.__version__} on this CPU dequantizes weights with an error of 100% of the "
            "largest weight. Use 8 or 16, or run on a GPU.\n"
        ) in printed(capsys, status=1)

    def test_weights_that_come_back_right_are_not(self, of_width, capsys, monkeypatch):
        of_width(96)
        asked = []
        monkeypatch.setattr(quantization, "check_4bit_round_trip", lambda *arguments: asked.append(arguments))

        assert "ok       4-bit weights are given back as they were stored\n" in printed(capsys)
        assert asked == [({96, 128}, "nf4", torch.float32)]

    @pytest.mark.parametrize(
        ("width", "bits", "gpus"), [(64, 4, []), (96, 8, []), (96, 16, []), (96, 4, [H100])], ids=str
    )
    def test_who_is_not_concerned_is_not_kept_waiting(
        self, of_width, capsys, monkeypatch, write_params, width, bits, gpus
    ):
        of_width(width)
        write_params({"quantization.bits": bits})
        monkeypatch.setattr(environment, "find_gpus", lambda: gpus)
        for look in ("torch_build", "bitsandbytes"):  # a CPU build has no part for a GPU
            monkeypatch.setattr(environment, look, lambda *_: Finding("ok", "library", "is there"))
        monkeypatch.setitem(sys.modules, "pdf2lora.model.quantization", None)  # an import would fail

        assert "4-bit weights" not in printed(capsys)


class TestEnvironment:
    def test_packages_at_other_versions_are_named(self, tmp_path):
        file = tmp_path / "requirements.txt"
        file.write_text(
            "# comment\nnumpy==0.1\nno-such-package==2.0 # why\ntorch=="
            + str(environment.installed("torch")).partition("+")[0]
        )

        assert environment.packages(file) == Finding(
            "problem",
            "packages",
            f"numpy is {environment.installed('numpy')}, not 0.1, no-such-package is missing; run make setup",
        )

    def test_a_cpu_build_beside_a_gpu_is_a_problem(self, tmp_path, monkeypatch):
        package = tmp_path / "torch"
        package.mkdir()
        (package / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
        monkeypatch.setattr(environment, "_folder_of", lambda name: package)

        assert environment.torch_build([]).level == "ok"
        assert environment.torch_build([H100]).level == "problem"
        assert "2.13.0+cpu is a CPU build and would leave the GPU idle" in environment.torch_build([H100]).text

        (package / "version.py").write_text("__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\n")
        assert environment.torch_build([H100]) == Finding("ok", "torch", "2.13.0+cu128, built for CUDA 12.8")

    def test_the_installed_torch_is_understood(self):
        import torch

        assert environment.torch_build([]).text.startswith(torch.__version__)

    def test_bitsandbytes_needs_a_library_for_the_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(environment, "_folder_of", lambda name: tmp_path)
        (tmp_path / "libbitsandbytes_cpu.so").touch()

        assert environment.bitsandbytes(4, []).level == "ok"
        assert environment.bitsandbytes(4, [H100]).level == "problem"
        assert environment.bitsandbytes(16, [H100]).level == "ok"

    def test_flash_attention_that_is_asked_for_must_be_there(self, monkeypatch):
        monkeypatch.setattr(environment, "installed", lambda package: None)

        assert environment.flash_attention("flash_attention_2", [H100]).level == "problem"
        assert environment.flash_attention("auto", [H100]).level == "note"

    def test_gpus_are_read_from_nvidia_smi(self, tmp_path, monkeypatch):
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 570.10, 15360, 7.5'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

        assert environment.find_gpus() == [T4]
        assert environment.gpu([T4]).level == "note"

    def test_an_nvidia_smi_that_fails_is_no_gpu(self, tmp_path, monkeypatch):
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

        assert environment.find_gpus() == []

    def test_too_little_memory_or_disk_is_a_problem(self, tmp_path):
        assert environment.memory(1e6).level == environment.disk(tmp_path, 1e6).level == "problem"
        assert environment.memory(0.001).level == environment.disk(tmp_path, 0.001).level == "ok"


class TestForecast:
    @quiet
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_lora_parameters_are_those_that_peft_makes(self, tmp_path, use_dora):
        base = write_tiny_llama(tmp_path / "base")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        write_tiny_adapter(tmp_path / "adapter", base, target_modules=targets, use_dora=use_dora)
        lora = changed(LORA, r=4, target_modules=targets, use_dora=use_dora)

        made = sum(value.numel() for value in load_file(tmp_path / "adapter/adapter_model.safetensors").values())

        assert read_shape(base).lora_parameters(lora) == made

    def test_the_demo_s_shape_is_read_from_either_layout(self, tmp_path):
        shape = read_shape(REPOSITORY / "models/source/demo")
        metrics = json.loads((REPOSITORY / "metrics/convert.json").read_text())

        assert shape.intermediate_size == metrics["intermediate_size"]
        assert shape.kv_size == metrics["hidden_size"] // 2
        assert shape.num_parameters == pytest.approx(metrics["num_parameters"], rel=0.01)

    def test_heads_may_be_wider_than_the_hidden_size_says(self, tmp_path):
        base = write_tiny_llama(tmp_path / "base", head_dim=32)

        assert read_shape(base).layers["q_proj"] == (64, 128)
        assert read_shape(base).layers["k_proj"] == (64, 64)
        assert read_shape(base).layers["o_proj"] == (128, 64)

    def test_a_3b_base_in_4_bits(self):
        assert 2.0 < LLAMA_3B.base_gib(QUANTIZATION) < 2.2
        assert LLAMA_3B.base_gib(changed(QUANTIZATION, bits=16)) == pytest.approx(2 * 3_212_749_824 / 2**30)

    @pytest.mark.parametrize(
        ("sequences", "batch", "epochs", "wanted"), [(167, 4, 1, 42), (167, 4, 0.1, 5), (8, 8, 3, 3)]
    )
    def test_steps(self, sequences, batch, epochs, wanted):
        assert steps(sequences, batch, epochs) == wanted

    def test_of_long_texts_a_part_is_counted(self, tmp_path, monkeypatch):
        tokenizer = write_tiny_llama(tmp_path) / "tokenizer.json"
        monkeypatch.setattr(forecast, "COUNTED_CHARACTERS", 150)

        assert count_tokens(["x" * 100] * 10, tokenizer) == (1020, False)
        assert count_tokens(["x" * 100], tokenizer) == (102, True)

    def test_pages_are_counted_also_among_damaged_files(self, pdfs):
        assert count_pages([pdfs["plain"], pdfs["no_pdf"]], 30) == 3
        assert count_pages([pdfs["plain"]], 2) == 2

    def test_a_gpu_that_is_not_known_is_not_guessed(self, write_params):
        params = read_params(write_params())
        before = Before(params, lock={}, machine={}, batch={})

        estimate = forecast.time_estimate(before, params, LLAMA_3B, [T4], 1000)

        assert (estimate.how, estimate.text) == ("unknown", "-")


def test_takes_less_than_two_seconds_of_a_processor():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    output = subprocess.run([sys.executable, "-m", "commands.doctor"], cwd=REPOSITORY, capture_output=True, text=True)

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "this run" in output.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
