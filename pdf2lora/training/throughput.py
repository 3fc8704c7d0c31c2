"""Model FLOP utilization of a training step (Chowdhery et al. 2022, PaLM, appendix B).

It is the share of the GPU's peak rate (from its data sheet) that a step uses. Recomputation, which saves memory, does
not count.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # doctor reads the table and imports neither torch nor transformers
    from transformers import LlamaConfig

# Dense bfloat16 FLOP/s of the vendors' data sheets, in 1e12. The keys are whole words of the GPU's name in CUDA.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "A100": 312,
    "A40": 149.7,
    "A30": 165,
    "A10G": 125,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
}


def flop_per_token(config: "LlamaConfig", seq_length: int) -> float:
    """FLOP of one token in a LoRA training step: forward pass and gradients of activations, not of frozen weights.

    Each weight of a matrix product costs 2 FLOP forward and 2 backward. Causal attention reads half a sequence on
    average, with two products forward and four backward (Dao 2023, FlashAttention-2, section 4). Embeddings and LoRA
    are not counted.
    """
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    weights_of_a_layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * weights_of_a_layer + config.hidden_size * config.vocab_size
    attention = config.num_hidden_layers * 6 * 2 * queries * seq_length / 2
    return float(4 * weights + attention)


def peak_flop_per_s(gpu: str) -> float | None:
    """The dense bfloat16 rate of a GPU's data sheet; None for a GPU that is not in PEAK_TFLOPS."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), None)


def model_flops_utilization(tokens_per_s: float, config: "LlamaConfig", seq_length: int, gpu: str) -> float | None:
    """A share, 0 to 1; None for a GPU that is not in the table."""
    peak = peak_flop_per_s(gpu)
    return None if peak is None else tokens_per_s * flop_per_token(config, seq_length) / peak
