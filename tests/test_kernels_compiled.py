"""Compiles the kernels for GPUs that this machine does not have: compile_kernels.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize("capability", [80, 89, 90, 120])  # A100, RTX 4090, H100, RTX 5090
def test_kernels_compile_for_gpus_and_fit_into_their_shared_memory(tmp_path, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "compile_kernels.py", str(capability)],
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert compiled.returncode == 0, compiled.stderr
    lines = [line.split() for line in compiled.stdout.splitlines()]
    kernels = [(name, int(rank), int(shared), int(spilled)) for name, rank, shared, spilled in lines]
    assert {name for name, *_ in kernels} - {"_quantize", "_convert"} == {
        "_add_rmsnorm", "_rmsnorm_backward", "_swiglu", "_swiglu_backward", "_cross_entropy", "_dequantize",
        "_down", "_backward", "_rotate", "_rotary_backward", "_keep_mask",
    }  # fmt: skip
    assert max(shared for _, _, shared, _ in kernels) <= 99 * 1024
    assert not [kernel for kernel in kernels if kernel[1] <= 16 and kernel[3] > 0]  # the usual ranks spill nothing
