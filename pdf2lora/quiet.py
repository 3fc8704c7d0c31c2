"""Keeps out of the output what a library says that concerns nobody here; to be imported before the library is.

By itself and light, so that a process which is to import the libraries later, or for others, can import this first.
"""

import logging

# On a CPU with AVX512-BF16, bitsandbytes misses a kernel for repacked weights. model.py lets none be repacked.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
