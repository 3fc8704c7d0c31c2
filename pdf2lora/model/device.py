"""The device of this process, its memory limit and the data type of its computations."""

import torch

from pdf2lora.errors import InputError
from pdf2lora.params import Compute

NO_CUDA_GPU = "this machine has no CUDA GPU"  # why kernels, attention or CUDA graphs cannot run


def device() -> torch.device:
    """The current CUDA GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def limit_gpu_memory(limit_gib: float) -> None:
    """Limits the GPU memory that this process can reserve. So a large GPU emulates a small one."""
    if torch.cuda.is_available():
        total_gib = torch.cuda.mem_get_info()[1] / 2**30
        torch.cuda.set_per_process_memory_fraction(min(limit_gib / total_gib, 1.0))


def compute_dtype(compute: Compute) -> torch.dtype:
    """The data type of matrix products. `auto`: bfloat16 or float16 on a GPU, float32 on a CPU.

    GPUs before compute capability 8.0 only emulate bfloat16. There `auto` selects float16, and training scales the
    loss. Most CPUs emulate bfloat16 too: on two cores with AVX2 a training step of the demo took 38 s in bfloat16 and
    2.6 s in float32.

    Raises InputError if this machine does not support the data type.
    """
    has_gpu = torch.cuda.is_available()
    has_bfloat16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    match compute.compute_dtype:
        case "auto":
            return torch.float32 if not has_gpu else torch.bfloat16 if has_bfloat16 else torch.float16
        case "bfloat16":
            if has_gpu and not has_bfloat16:
                raise InputError("compute.compute_dtype is 'bfloat16', which this GPU only emulates. Use 'auto'.")
            return torch.bfloat16
        case "float16":
            if not has_gpu:
                raise InputError("compute.compute_dtype is 'float16', which needs a CUDA GPU. Use 'auto' or 'float32'.")
            return torch.float16
        case _:
            return torch.float32
