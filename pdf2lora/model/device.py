"""The device of this process, its memory limit and the data type of its computations."""

import torch

from pdf2lora.params import Compute


def device() -> torch.device:
    """The current CUDA GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def limit_gpu_memory(limit_gib: float) -> None:
    """Limits the memory that this process's allocator reserves: a large GPU emulates a small one."""
    if torch.cuda.is_available():
        total_gib = torch.cuda.mem_get_info()[1] / 2**30
        torch.cuda.set_per_process_memory_fraction(min(limit_gib / total_gib, 1.0))


def compute_dtype(compute: Compute) -> torch.dtype:
    """The data type of matrix products. `auto`: bfloat16 on a GPU that supports it, float32 elsewhere.

    Most CPUs emulate bfloat16. On two cores with AVX2 a training step of the demo took 38 s in bfloat16 and 2.6 s in
    float32.
    """
    if compute.compute_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if compute.compute_dtype == "bfloat16" else torch.float32
