"""Host memory that the base model needs in the stages of a run."""

from collections.abc import Sequence

from pdf2lora.params import UNQUANTIZED_GPU_SHARE, Compute, Params
from pdf2lora.preflight.environment import Gpu, memory
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import GIB, ModelShape
from pdf2lora.preflight.placement import streams_layers

LIBRARIES_GIB = 1.5  # torch, transformers and the rest


def host_memory(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> Finding:
    """Compares the free memory with the larger need: that of train, or that of evaluate's unquantized base."""
    trained_gib, unquantized_gib = trained_base_gib(params, shape, gpus), unquantized_base_gib(params, shape, gpus)
    remedy = "Use evaluate.unquantized_base=false, or free some" if unquantized_gib > trained_gib else "Free some"
    return memory(LIBRARIES_GIB + max(trained_gib, unquantized_gib), remedy)


def trained_base_gib(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> float:
    """The base on a CPU; with a GPU, only the decoder layers that are in host memory."""
    if gpus:
        return shape.layers_gib(params.quantization) if streams_layers(params, shape, gpus) else 0.0
    if params.quantization.bits == 16:
        return shape.num_parameters * _bytes_per_weight(params.compute, gpus) / GIB
    return shape.base_gib(params.quantization)


def unquantized_base_gib(params: Params, shape: ModelShape, gpus: Sequence[Gpu]) -> float:
    """The part of the unquantized base that evaluate keeps in host memory; 0 if evaluate does not score it."""
    if params.quantization.bits == 16 or not params.evaluate.unquantized_base:
        return 0.0
    weights_gib = shape.num_parameters * _bytes_per_weight(params.compute, gpus) / GIB
    gpu_gib = UNQUANTIZED_GPU_SHARE * min((gpu.memory_gib for gpu in gpus), default=0.0)
    return max(0.0, weights_gib - gpu_gib)


def _bytes_per_weight(compute: Compute, gpus: Sequence[Gpu]) -> int:
    is_float32 = compute.compute_dtype == "float32" or (compute.compute_dtype == "auto" and not gpus)
    return 4 if is_float32 else 2
