"""Findings about the machine and its Python packages."""

import compileall
import subprocess
import sys

import psutil
import pytest
import torch

from pdf2lora.preflight import environment
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.findings import Finding

H100 = Gpu("NVIDIA H100 80GB HBM3", "570.10", 79.6, 9.0)
T4 = Gpu("Tesla T4", "570.10", 15.0, 7.5)


def test_packages_of_other_versions_are_listed(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# comment\nnumpy==0.1\nno-such-package==2.0 # why\ntorch=="
        + str(environment.installed("torch")).partition("+")[0]
    )

    assert environment.packages(file) == Finding(
        "problem",
        "packages",
        f"numpy is {environment.installed('numpy')}, not 0.1, no-such-package is missing. Run: make setup",
    )


def test_a_cpu_build_on_a_machine_with_a_gpu_is_a_problem(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    monkeypatch.setattr(environment, "_package_folder", lambda name: package)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)

    assert environment.torch_build([]).level == "ok"
    assert environment.torch_build([H100]).level == "problem"
    assert "2.13.0+cpu is a CPU build, which does not use the GPU" in environment.torch_build([H100]).text

    (package / "version.py").write_text("__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\n")
    assert environment.torch_build([H100]) == Finding("ok", "torch", "2.13.0+cu128, built for CUDA 12.8")


def test_a_torch_that_python_compiles_at_each_start_is_a_note(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    for name, content in (("version.py", "__version__ = '2.13.0+cpu'\n"), ("__init__.py", "")):
        (package / name).write_text(content)
    monkeypatch.setattr(environment, "_package_folder", lambda name: package)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    finding = environment.torch_build([])

    assert finding.level == "note"
    assert finding.text.endswith(f"or run: python -m compileall -q {tmp_path}")
    compileall.compile_dir(package, quiet=1)
    assert environment.torch_build([]) == Finding("ok", "torch", "2.13.0+cpu, a CPU build")


def test_the_installed_torch_is_recognized():
    assert environment.torch_build([]).text.startswith(torch.__version__)


def test_bitsandbytes_needs_a_library_for_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_package_folder", lambda name: tmp_path)
    (tmp_path / "libbitsandbytes_cpu.so").touch()

    assert environment.bitsandbytes(4, []).level == "ok"
    assert environment.bitsandbytes(4, [H100]).level == "problem"
    assert environment.bitsandbytes(16, [H100]).level == "ok"


def test_flash_attention_must_be_installed_if_it_is_set(monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: None)

    assert environment.flash_attention("flash_attention_2", [H100]).level == "problem"
    assert environment.flash_attention("auto", [H100]).level == "note"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Replaces nvidia-smi by a program that prints these lines."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def replace(*lines):
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return replace


def test_gpus_are_read_from_nvidia_smi(nvidia_smi):
    nvidia_smi("GPU-aaaa, Tesla T4, 570.10, 15360, 7.5")

    assert environment.find_gpus() == [T4]
    assert environment.gpu([T4], "auto").level == "note"


def test_a_gpu_without_its_own_memory_uses_that_of_the_machine(nvidia_smi):
    nvidia_smi("GPU-aaaa, NVIDIA GB10, 580.10, [N/A], 12.1")

    [gpu] = environment.find_gpus()

    assert gpu.memory_gib == pytest.approx(psutil.virtual_memory().total / 2**30)


def test_a_driver_that_does_not_know_the_compute_capability(nvidia_smi):
    nvidia_smi("GPU-aaaa, Tesla T4, 440.33, 15360, [N/A]")

    gpus = environment.find_gpus()

    assert gpus == [Gpu("Tesla T4", "440.33", 15.0, None)]
    assert environment.gpu(gpus, "auto").level == "ok"


@pytest.mark.parametrize(
    ("variable", "allowed", "found"),
    [
        (None, ["GPU-aaaa", "GPU-bbbb"], ["A", "B"]),
        ("1,0", ["GPU-bbbb", "GPU-aaaa"], ["B", "A"]),
        ("1", ["GPU-bbbb"], ["B"]),
        ("", [], []),
        ("MIG-cccc", ["MIG-cccc"], ["A", "B"]),  # a slice of one of them
    ],
)
def test_only_gpus_that_a_run_may_use_count(nvidia_smi, monkeypatch, variable, allowed, found):
    nvidia_smi("GPU-aaaa, A, 570.10, 15360, 7.5", "GPU-bbbb, B, 570.10, 15360, 7.5")
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(environment, "visible_gpus", lambda: allowed)

    assert [gpu.name for gpu in environment.find_gpus()] == found


def test_a_missing_git_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert environment.git().level == "problem"


def test_the_number_of_gpus_that_a_run_uses():
    assert "uses 2 of 2 GPUs" in environment.gpu([H100, H100], "auto").text
    assert "uses 1 of 2 GPUs" in environment.gpu([H100, H100], 1).text
    assert "uses" not in environment.gpu([H100], "auto").text


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "problem"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "problem")]
)
def test_versions_of_python(monkeypatch, version, level):
    """The same as in pyproject.toml."""
    monkeypatch.setattr(environment.sys, "version_info", (*version, 1))

    assert environment.python_version().level == level


def test_no_gpu_if_nvidia_smi_fails(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    assert environment.find_gpus() == []


def test_too_little_memory_or_disk_is_a_problem(tmp_path):
    assert environment.memory(1e6).level == environment.disk(tmp_path, 1e6).level == "problem"
    assert environment.memory(0.001).level == environment.disk(tmp_path, 0.001).level == "ok"


def test_a_missing_git_repository_or_identity_is_found(monkeypatch, tmp_path):
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, str(tmp_path / "gitconfig"))
    (tmp_path / "gitconfig").write_text("[user]\n\tuseConfigOnly = true\n")

    no_repository = environment.git()
    subprocess.run(["git", "init", "--quiet"], check=True)
    missing = environment.git()

    assert no_repository.level == "problem"
    assert "Run: git init" in no_repository.text

    assert (missing.level, missing.subject) == ("note", "git")
    assert "git config --global user.name" in missing.text
    (tmp_path / "gitconfig").write_text("[user]\n\tname = A\n\temail = a@example.org\n")
    assert environment.git().level == "ok"
