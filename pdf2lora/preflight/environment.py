"""This machine and its Python packages. Only the check of 4-bit weights imports torch, which takes seconds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pdf2lora.errors import InputError
from pdf2lora.params import Params
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import ModelShape
from pdf2lora.runtime.free_space import available_bytes
from pdf2lora.runtime.gpus import visible_gpus

GIB = 2**30
BLOCK_SIZE = 64  # weights that share a scale in 4 bits; only other widths can be read back wrongly
NVIDIA_SMI_TIMEOUT_S = 10
NVIDIA_SMI_FIELDS = "uuid,name,driver_version,memory.total,compute_cap"


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    memory_gib: float
    compute_capability: float | None
    """None: the driver does not know it."""


def python_version() -> Finding:
    current = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("ok", "Python", current)
    return Finding("problem", "Python", f"{current}; it must be 3.11, 3.12 or 3.13. Run: make repro PYTHON=python3.11")


def packages(requirements: Path) -> Finding:
    """Whether the packages of a requirements file are installed with the pinned versions."""
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for name, required in pinned.items():
        current = installed(name)
        if current is None:
            wrong.append(f"{name} is missing")
        elif current.partition("+")[0] != required:  # torch appends its build after a plus
            wrong.append(f"{name} is {current}, not {required}")
    if wrong:
        return Finding("problem", "packages", f"{', '.join(wrong)}. Run: make setup")
    return Finding("ok", "packages", f"all {len(pinned)} packages of {requirements.name} have the pinned versions")


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows; none if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = {}
    for line in result.stdout.splitlines():
        uuid, name, driver, mebibytes, capability = (field.strip() for field in line.split(","))
        # A field that the driver does not know is [N/A]. A GPU without its own memory uses the host's.
        memory_gib = float(mebibytes) / 1024 if mebibytes.isdigit() else psutil.virtual_memory().total / GIB
        gpus[uuid] = Gpu(name, driver, memory_gib, None if capability == "[N/A]" else float(capability))
    allowed = visible_gpus() if "CUDA_VISIBLE_DEVICES" in os.environ else list(gpus)
    if any(name.startswith("MIG-") for name in allowed):  # slices of GPUs: nvidia-smi lists only whole ones
        return list(gpus.values())
    return [gpus[name] for name in allowed if name in gpus]


def gpu(gpus: list[Gpu], num_processes: int | str) -> Finding:
    """num_processes: compute.num_processes; each process uses one GPU."""
    if not gpus:
        return Finding("note", "GPU", "nvidia-smi lists no GPU that a run may use. All stages run on the CPU.")
    first = gpus[0]
    text = f"{first.name}, {first.memory_gib:.0f} GiB, driver {first.driver}"
    if len(gpus) > 1:
        num_used = len(gpus) if num_processes == "auto" else num_processes
        text += f"; compute.num_processes {num_processes} uses {num_used} of {len(gpus)} GPUs"
    if first.compute_capability is not None and first.compute_capability < 8:
        return Finding("note", "GPU", f"{text}; no bfloat16 below compute capability 8.0, so float16 is used")
    return Finding("ok", "GPU", text)


def torch_build(gpus: list[Gpu]) -> Finding:
    """The version in torch/version.py, whether it can use the GPU, and whether Python compiles it at each start."""
    package = _package_folder("torch")
    if package is None:
        return Finding("problem", "torch", "not installed. Run: make setup")
    lines = (package / "version.py").read_text(encoding="utf-8")
    version_match = re.search(r"__version__ = ['\"](.+?)['\"]", lines)
    cuda_match = re.search(r"^cuda\b.*= ['\"](.+?)['\"]", lines, re.MULTILINE)
    name = version_match[1] if version_match else str(installed("torch"))
    if gpus and not cuda_match:
        text = f"{name} is a CPU build, which does not use the GPU. Run: rm .venv/.installed; make setup"
        return Finding("problem", "torch", text)
    text = f"{name}, built for CUDA {cuda_match[1]}" if cuda_match else f"{name}, a CPU build"
    if sys.dont_write_bytecode and not Path(importlib.util.cache_from_source(str(package / "__init__.py"))).exists():
        remedy = f"Unset PYTHONDONTWRITEBYTECODE, or run: python -m compileall -q {package.parent}"
        return Finding("note", "torch", f"{text}; Python compiles it at each start, which takes seconds. {remedy}")
    return Finding("ok", "torch", text)


def bitsandbytes(bits: int, gpus: list[Gpu]) -> Finding:
    """Whether bitsandbytes has a compiled library for this machine."""
    package = _package_folder("bitsandbytes")
    backend = "cuda" if gpus else "cpu"
    if bits == 16:
        return Finding("ok", "bitsandbytes", "not needed for the base model: quantization.bits is 16")
    if package is None:
        return Finding("problem", "bitsandbytes", "not installed. Run make setup, or use quantization.bits=16.")
    if not list(package.glob(f"libbitsandbytes_{backend}*")):
        text = f"{package} has no library for {backend}. Use quantization.bits=16."
        return Finding("problem", "bitsandbytes", text)
    return Finding("ok", "bitsandbytes", f"{installed('bitsandbytes')}, with a library for {backend}")


def flash_attention(attention: str, gpus: list[Gpu]) -> Finding:
    """attention: compute.attention in params.yaml."""
    current = installed("flash-attn")
    if current:
        return Finding("ok", "flash-attn", current)
    if attention == "flash_attention_2":
        text = "not installed, but compute.attention is flash_attention_2. Install requirements-gpu.txt."
        return Finding("problem", "flash-attn", text)
    if gpus:
        return Finding("note", "flash-attn", "not installed, so sdpa is used. requirements-gpu.txt has it.")
    return Finding("ok", "flash-attn", "not installed, so sdpa is used. It needs a GPU.")


def git() -> Finding:
    """Checks git for DVC. `dvc repro` needs a repository, and `dvc exp run` needs a user name and address."""
    if shutil.which("git") is None:
        return Finding("problem", "git", "not installed; DVC and the experiments need it. Install git.")
    if subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True, check=False).returncode != 0:
        return Finding(
            "problem", "git", "this folder is not in a git repository, but DVC needs one. Run: git init; git add --all"
        )
    process = subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], capture_output=True, text=True, check=False)
    if process.returncode == 0:
        return Finding("ok", "git", "user.name and user.email are set")
    return Finding(
        "note",
        "git",
        "dvc exp run cannot commit: git has no identity. Run: git config --global user.name NAME; "
        "git config --global user.email ADDRESS",
    )


def memory(needed_gib: float, remedy: str = "Free some") -> Finding:
    available_gib = available_bytes() / GIB
    if available_gib < needed_gib:
        text = f"{available_gib:.1f} GiB free, about {needed_gib:.1f} GiB needed. {remedy} (free -h shows it)."
        return Finding("problem", "memory", text)
    return Finding("ok", "memory", f"{available_gib:.1f} GiB free, {psutil.cpu_count(logical=True)} processors")


def disk(folder: Path, needed_gib: float) -> Finding:
    free_gib = shutil.disk_usage(folder).free / GIB
    text = f"{free_gib:.1f} GiB free, about {needed_gib:.2f} GiB more needed"
    if free_gib > needed_gib:
        return Finding("ok", "disk", text)
    return Finding("problem", "disk", f"{text}. Free some space.")


def four_bit_weights(params: Params, shape: ModelShape, *, has_gpu: bool) -> list[Finding]:
    """Checks the model's widths as the stages do. Returns no finding if the check cannot fail."""
    widths = {num_inputs for block in shape.blocks for num_inputs, _ in block.values()}
    if has_gpu or params.quantization.bits != 4 or all(width % BLOCK_SIZE == 0 for width in widths):
        return []
    from pdf2lora.model.device import compute_dtype
    from pdf2lora.model.quantization import check_4bit_round_trip

    try:
        check_4bit_round_trip(widths, params.quantization.bnb_4bit_quant_type, compute_dtype(params.compute))
    except InputError as error:
        return [Finding("problem", "4-bit weights", str(error))]
    return [Finding("ok", "4-bit weights", "this machine reads them back correctly")]


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # does not import the package
    return Path(spec.origin).parent if spec and spec.origin else None
