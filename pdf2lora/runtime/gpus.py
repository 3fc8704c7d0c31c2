"""Detects GPUs without importing torch, which takes seconds."""

import ctypes


def has_cuda_driver() -> bool:
    """True if a CUDA driver is installed. The machine may still have no usable GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
