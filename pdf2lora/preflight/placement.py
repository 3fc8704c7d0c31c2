"""Forecasts whether a run streams the base model's layers, and the memory and time for it (quantization.placement)."""

from collections.abc import Sequence

from pdf2lora.params import Params
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import ModelShape

LINK_GIB_PER_S = 45.0  # PCIe 5 with 16 lanes, measured on one H200; PCIe 4 has half


def gpu_budget_gib(params: Params, gpus: Sequence[Gpu]) -> float:
    """GPU memory of a training step, on the smallest GPU."""
    settings = params.find_batch
    smallest_gib = min(gpu.memory_gib for gpu in gpus)
    allowed_gib = smallest_gib if settings.memory_gib == "auto" else min(settings.memory_gib, smallest_gib)
    return allowed_gib - settings.gpu_headroom_gib


def streams_layers(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> bool:
    """Whether find_batch will not even try the whole model in GPU memory."""
    quantization = params.quantization
    if quantization.placement == "host":
        return True
    is_too_large = shape.base_gib(quantization) > gpu_budget_gib(params, gpus)
    return quantization.placement == "auto" and quantization.bits == 4 and is_too_large


def placement(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> Finding:
    """GPU memory of the part that stays there, host memory of the layers, and the time of their copies.

    Two buffers, each with one layer, are on the GPU. A micro-batch copies each layer twice.
    """
    quantization = params.quantization
    layers_gib = shape.layers_gib(quantization)
    fixed_gib = shape.base_gib(quantization) - layers_gib + 2 * layers_gib / shape.num_layers
    budget_gib = gpu_budget_gib(params, gpus)
    copies_s = 2 * layers_gib / LINK_GIB_PER_S
    text = (
        f"layers in host memory: {layers_gib:.1f} GiB pinned there, {fixed_gib:.1f} GiB and the activations on the "
        f"GPU; copies take about {copies_s:.2g} s per micro-batch, hidden if it computes longer"
    )
    if fixed_gib > budget_gib:
        return Finding("problem", "placement", f"{text}. The budget is {budget_gib:.1f} GiB. Use a smaller base model.")
    return Finding("ok", "placement", text)
