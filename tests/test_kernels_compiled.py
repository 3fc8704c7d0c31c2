"""Compiles the kernels for GPUs that this machine does not have: compile_kernels.py.

Triton's cache is in .pytest_cache, so that the next run compiles only kernels that changed.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import REPOSITORY

CAPABILITIES = [80, 89, 90, 120]  # A100, RTX 4090, H100, RTX 5090
WITH_FP8 = {
    "_add_rmsnorm", "_rmsnorm_backward", "_swiglu", "_swiglu_backward", "_quantize", "_convert", "_append",
    "_append_to_weights",
}  # fmt: skip
WITHOUT_FP8 = {
    "_add_rmsnorm", "_rmsnorm_backward", "_swiglu", "_swiglu_backward", "_cross_entropy", "_dequantize",
    "_dequantize_and_add", "_down", "_gradient_of_a", "_add_gradient_of_x", "_rotate", "_rotary_backward", "_keep_mask",
    "_both_products", "_copy_lora",
}  # fmt: skip
ALL = WITHOUT_FP8 | WITH_FP8
NAMES = {80: WITHOUT_FP8, 89: WITH_FP8, 90: ALL, 120: ALL - {"_cross_entropy", "_dequantize", "_keep_mask"}}


@pytest.fixture(scope="module")
def compiled(pytestconfig):
    """Per capability: name, LoRA rank, bytes of shared memory and of spilled registers of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = pytestconfig.cache.mkdir("triton")
    done = subprocess.run(
        [sys.executable, "compile_kernels.py", *map(str, CAPABILITIES)],
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = defaultdict(list)
    for line in done.stdout.splitlines():
        capability, name, *numbers = line.split()
        kernels[int(capability)].append((name, *map(int, numbers)))
    return kernels


@pytest.mark.timeout(600)  # one process compiles for all GPUs
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_gpus_and_fit_into_their_shared_memory(compiled, capability):
    kernels = compiled[capability]

    assert {name for name, *_ in kernels} == NAMES[capability]
    assert max(shared for _, _, shared, _ in kernels) <= 99 * 1024
    assert not [kernel for kernel in kernels if kernel[1] <= 16 and kernel[3] > 0]  # the usual ranks spill nothing
