"""pdf2lora: PDFs and a base model -> a LoRA adapter and its perplexity."""

import logging

# Suppresses one irrelevant bitsandbytes warning: on CPUs with AVX512-BF16 it misses a kernel for repacked weights, and
# model/loading.py allows no repacking. The filter must exist before bitsandbytes is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
