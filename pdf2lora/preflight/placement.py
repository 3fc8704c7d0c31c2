"""Forecasts whether a run streams the base model's layers, with memory and time (quantization.placement)."""

from collections.abc import Sequence

from pdf2lora.params import Params, Quantization
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import ModelShape

LINK_GIB_PER_S = 45.0  # PCIe 5 with 16 lanes, measured on one H200; PCIe 4 has half of it


def gpu_budget_gib(params: Params, gpus: Sequence[Gpu]) -> float:
    """GPU memory of a training step, on the smallest GPU."""
    return params.find_batch.gpu_budget_gib(min(gpu.memory_gib for gpu in gpus))


def streams_layers(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> bool:
    """Whether find_batch will not try the whole model in GPU memory."""
    quantization = params.quantization
    if quantization.bits != 4 or not shape.can_be_packed:
        return False
    is_too_large = shape.base_gib(quantization) > gpu_budget_gib(params, gpus)
    return quantization.placement == "host" or (quantization.placement == "auto" and is_too_large)


def placement(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> Finding | None:
    """The memory and time of streamed layers, or why the model cannot run. None: the whole model fits into the GPU."""
    budget_gib = gpu_budget_gib(params, gpus)
    if streams_layers(params, shape, gpus):
        return _streamed_layers(params.quantization, shape, budget_gib)
    return _obstacle(params.quantization, shape, budget_gib)


def _streamed_layers(quantization: Quantization, shape: ModelShape, budget_gib: float) -> Finding:
    """Two buffers, each with one layer, are on the GPU. A micro-batch copies each layer twice."""
    layers_gib = shape.layers_gib(quantization)
    fixed_gib = shape.base_gib(quantization) - layers_gib + 2 * layers_gib / len(shape.blocks)
    copies_s = 2 * layers_gib / LINK_GIB_PER_S
    text = (
        f"layers in host memory: {layers_gib:.1f} GiB there (pinned), {fixed_gib:.1f} GiB and the activations on the "
        f"GPU; the copies of a micro-batch take about {copies_s:.2g} s, at no cost if its computation takes longer"
    )
    if fixed_gib > budget_gib:
        return Finding("problem", "placement", f"{text}. The budget is {budget_gib:.1f} GiB. Use a smaller base model.")
    return Finding("ok", "placement", text)


def _obstacle(quantization: Quantization, shape: ModelShape, budget_gib: float) -> Finding | None:
    """Why the model cannot run with all layers on the GPU; None if it can."""
    not_streamed = "" if shape.can_be_packed else "; its layers cannot be in host memory"
    if quantization.placement == "host":
        reason = not_streamed or "; layers in host memory need quantization.bits 4"
        return Finding("problem", "placement", f"quantization.placement is 'host'{reason}. Use 'auto'.")
    base_gib = shape.base_gib(quantization)
    if base_gib <= budget_gib:
        return None
    if quantization.bits != 4:
        remedy = "Use a smaller base model or fewer bits"
    else:
        remedy = "Use quantization.placement auto" if shape.can_be_packed else "Use a smaller base model"
    text = f"the base model needs {base_gib:.1f} GiB on the GPU, and the budget is {budget_gib:.1f} GiB{not_streamed}"
    return Finding("problem", "placement", f"{text}. {remedy}.")
