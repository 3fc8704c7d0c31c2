"""What this machine and its Python have, learned without importing torch, which would take longer than all else."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

GIB = 2**30
NVIDIA_SMI_TIMEOUT_S = 10
QUERY = "name,driver_version,memory.total,compute_cap"


@dataclass(frozen=True)
class Finding:
    """`ok`, a `note` (it works, and could do more) or a `problem` (the run would fail)."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    memory_gib: float
    compute_capability: float


def python_version() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("ok", "Python", found)
    return Finding("problem", "Python", f"{found}, must be 3.11 or 3.12; make repro PYTHON=python3.11")


def packages(requirements: Path) -> Finding:
    """Whether the packages of a requirements file are installed at its versions."""
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for name, wanted in pinned.items():
        found = installed(name)
        if found is None:
            wrong.append(f"{name} is missing")
        elif found.partition("+")[0] != wanted:  # torch says its build after the plus
            wrong.append(f"{name} is {found}, not {wanted}")
    if wrong:
        return Finding("problem", "packages", f"{', '.join(wrong)}; run make setup")
    return Finding("ok", "packages", f"all {len(pinned)} of {requirements.name} at their versions")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_gpus() -> list[Gpu]:
    """NVIDIA GPUs as nvidia-smi tells of them; none where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in answer.stdout.splitlines():
        name, driver, mebibytes, capability = (field.strip() for field in line.split(","))
        gpus.append(Gpu(name, driver, float(mebibytes) / 1024, float(capability)))
    return gpus


def gpu(gpus: list[Gpu]) -> Finding:
    if not gpus:
        return Finding("note", "GPU", "none (nvidia-smi names none): all runs on the CPU, as the demo does")
    first = gpus[0]
    text = f"{first.name}, {first.memory_gib:.0f} GiB, driver {first.driver}"
    if len(gpus) > 1:
        text += f"; {len(gpus)} there, one is used (choose it with CUDA_VISIBLE_DEVICES)"
    if first.compute_capability < 8:
        return Finding("note", "GPU", f"{text}; no bfloat16 before compute capability 8.0: it computes in float32")
    return Finding("ok", "GPU", text)


def torch_build(gpus: list[Gpu]) -> Finding:
    """The version that torch/version.py holds, and whether it can use the GPU that is there."""
    package = _folder_of("torch")
    if package is None:
        return Finding("problem", "torch", "is not installed; run make setup")
    lines = (package / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = ['\"](.+?)['\"]", lines)
    cuda = re.search(r"^cuda\b.*= ['\"](.+?)['\"]", lines, re.MULTILINE)
    name = found[1] if found else str(installed("torch"))
    if cuda:
        return Finding("ok", "torch", f"{name}, built for CUDA {cuda[1]}")
    if gpus:
        return Finding(
            "problem", "torch", f"{name} is a CPU build and would leave the GPU idle; rm .venv/.installed; make setup"
        )
    return Finding("ok", "torch", f"{name}, a CPU build")


def bitsandbytes(bits: int, gpus: list[Gpu]) -> Finding:
    """Whether its compiled library is there for this kind of machine."""
    package = _folder_of("bitsandbytes")
    kind = "cuda" if gpus else "cpu"
    if bits == 16:
        return Finding("ok", "bitsandbytes", "quantization.bits is 16: not needed for the base")
    if package is None:
        return Finding("problem", "bitsandbytes", "is not installed; run make setup or choose quantization.bits=16")
    if not list(package.glob(f"libbitsandbytes_{kind}*")):
        return Finding("problem", "bitsandbytes", f"no library for {kind} in {package}; choose quantization.bits=16")
    return Finding("ok", "bitsandbytes", f"{installed('bitsandbytes')}, with a library for {kind}")


def flash_attention(wanted: str, gpus: list[Gpu]) -> Finding:
    found = installed("flash-attn")
    if found:
        return Finding("ok", "flash-attn", found)
    if wanted == "flash_attention_2":
        return Finding(
            "problem", "flash-attn", "is not installed and compute.attention asks for it; see requirements-gpu.txt"
        )
    extra = "; requirements-gpu.txt has it" if gpus else ", and needs a GPU"
    return Finding("ok" if not gpus else "note", "flash-attn", f"not installed: PyTorch's sdpa runs instead{extra}")


def memory(needed_gib: float) -> Finding:
    found = psutil.virtual_memory().available / GIB
    if found < needed_gib:
        return Finding("problem", "memory", f"{found:.1f} GiB free, about {needed_gib:.1f} GiB needed")
    return Finding("ok", "memory", f"{found:.1f} GiB free, {psutil.cpu_count(logical=True)} processors")


def disk(folder: Path, needed_gib: float) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.1f} GiB free, about {needed_gib:.2f} GiB more needed"
    return Finding("ok", "disk", text) if free > needed_gib else Finding("problem", "disk", f"{text}; make room")


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # finds a package without importing it
    return Path(spec.origin).parent if spec and spec.origin else None
