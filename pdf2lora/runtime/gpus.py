"""What can be known of GPUs without importing torch."""

import ctypes


def has_cuda_driver() -> bool:
    """Whether there may be a GPU; torch would know, and takes seconds to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
