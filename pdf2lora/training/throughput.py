"""Model FLOP utilization of a training step (Chowdhery et al. 2022, PaLM, appendix B).

It is the share of the GPU's peak rate (from its data sheet) that a step uses. Recomputation, which saves memory, does
not count.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # doctor reads the table and imports neither torch nor transformers
    from transformers import PreTrainedModel

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


def flop_per_token(model: "PreTrainedModel", seq_length: int) -> float:
    """FLOP of one token in a LoRA training step: forward pass and gradients of activations, not of frozen weights.

    Each weight of a matrix product costs 2 FLOP forward and 2 backward. Causal attention reads half a sequence on
    average, with two products forward and four backward (Dao 2023, FlashAttention-2, section 4). Embeddings and LoRA
    are not counted.

    model: with or without LoRA matrices.
    """
    weights = sum(_num_weights(module) for name, module in model.named_modules() if ".lora_" not in name)
    config = model.config
    num_heads = getattr(config, "num_attention_heads", 0)  # a state space model has none
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(num_heads, 1)
    attention = config.num_hidden_layers * 6 * 2 * num_heads * head_dim * seq_length / 2
    return float(4 * weights + attention)


def _num_weights(module: Any) -> int:
    """Weights of a linear layer, which can be packed in 4 bits. 0 for other modules."""
    if hasattr(module, "base_layer"):  # PEFT's layer, which has the attributes of the linear layer that it contains
        return 0
    if hasattr(module, "in_features"):
        return int(module.in_features * module.out_features)
    return int(module.nx * module.nf) if hasattr(module, "nf") else 0  # GPT-2's Conv1D


def peak_flop_per_s(gpu: str) -> float | None:
    """The dense bfloat16 rate of a GPU's data sheet; None for a GPU that is not in PEAK_TFLOPS."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), None)


def model_flops_utilization(tokens_per_s: float, model: "PreTrainedModel", seq_length: int, gpu: str) -> float | None:
    """A share, 0 to 1; None for a GPU that is not in the table."""
    peak = peak_flop_per_s(gpu)
    return None if peak is None else tokens_per_s * flop_per_token(model, seq_length) / peak
