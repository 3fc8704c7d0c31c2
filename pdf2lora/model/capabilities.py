"""What this machine can compute: data type, attention, kernels, quantization."""

import importlib.util
import logging
from typing import Literal

import bitsandbytes as bnb
import torch

from pdf2lora.errors import InputError
from pdf2lora.params import Compute, Lora, Quantization, Train

log = logging.getLogger(__name__)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def limit_gpu_memory(gib: float) -> None:
    """The allocator of this process reserves no more than this: a large GPU stands for a small one."""
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1] / 2**30
        torch.cuda.set_per_process_memory_fraction(min(gib / total, 1.0))


def compute_dtype(compute: Compute) -> torch.dtype:
    """What products are computed in: bfloat16 on a GPU that has it, float32 on a CPU.

    Most CPUs have no bfloat16 arithmetic and emulate it: on two cores with AVX2 alone a training step of the demo
    took 38 s in bfloat16 and 2.6 s in float32.
    """
    if compute.compute_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if compute.compute_dtype == "bfloat16" else torch.float32


def attention(compute: Compute) -> str:
    """flash_attention_2 where it is installed and usable, else sdpa; says which one and why.

    Raises:
        InputError: flash_attention_2 was asked for and cannot run.
    """
    if not torch.cuda.is_available():
        obstacle = "there is no CUDA GPU"
    elif importlib.util.find_spec("flash_attn") is None:
        obstacle = "the package flash-attn is not installed"
    elif compute_dtype(compute) != torch.bfloat16:
        obstacle = "it computes in half precision only"
    elif torch.cuda.get_device_capability() < (8, 0):
        obstacle = "it needs a GPU of compute capability 8.0 or more"
    else:
        obstacle = ""
    if compute.attention == "flash_attention_2" and obstacle:
        raise InputError(
            f"compute.attention: 'flash_attention_2' cannot run here: {obstacle}; choose 'auto' or 'sdpa' "
            "(or see requirements-gpu.txt)"
        )
    runs = "sdpa" if obstacle or compute.attention == "sdpa" else "flash_attention_2"
    why = f" ({obstacle})" if obstacle and compute.attention == "auto" else ""
    log.info("attention: %s asked for, %s runs%s", compute.attention, runs, why)
    return runs


def require_quantization(bits: int) -> None:
    """Quantizes a few numbers: what is built for this machine shows there and not in the middle of a model."""
    if bits == 16:
        return
    numbers = torch.ones(64, 64, device=device())
    try:
        if bits == 4:
            bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(numbers, quant_type="nf4"))
        else:
            bnb.functional.int8_vectorwise_quant(numbers.half())
    except Exception as error:
        raise InputError(
            f"quantization.bits: {bits} is not possible here: bitsandbytes {bnb.__version__} on {device().type} says "
            f"'{' '.join(str(error).split())[:200]}'; install a bitsandbytes built for this machine or choose 16"
        ) from error


def check_4bit_round_trip(widths: set[int], quant_type: str, dtype: torch.dtype) -> None:
    """Stores random weights in 4 bits, at each number of input features, and compares what bitsandbytes reads with
    the table of the data type times each block's largest.

    On CPUs with AVX512, bitsandbytes 0.50.2 starts every row at a new block. Blocks have 64 weights and run on from
    row to row, so where the input features are a multiple of 16 and not of 64 (the widths of its vector code), most
    rows get the scales of other blocks, and products and gradients were off by 16% to 48%, without a word.

    Raises:
        InputError: a weight is not the one that was stored.
    """
    if device().type != "cpu":
        return
    same_each_time = torch.Generator().manual_seed(0)  # the stage's own random stream must not move
    for width in sorted(widths):
        weights = torch.randn(32, width, generator=same_each_time).to(dtype)
        packed, state = bnb.functional.quantize_4bit(weights, quant_type=quant_type)
        read = bnb.functional.dequantize_4bit(packed, state)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
        scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
        stored = (state.code[codes] * scales).view_as(read)
        off = ((read - stored).abs().max() / stored.abs().max()).item()
        if not off < 0.01:  # or is no number
            raise InputError(
                f"quantization.bits: 4 is not possible here for the model's layers of {width} input features: "
                f"bitsandbytes {bnb.__version__} on this CPU must give back the weights that it stored, and is off by "
                f"{off:.0%} of the largest; choose 8 or 16, or run on a GPU"
            )


log = logging.getLogger(__name__)


Kernels = Literal["reference", "fused", "fp8"]


# What a layer keeps between the passes: the more there is to recompute, the less memory and the more time a step takes.
CHECKPOINTING: dict[Kernels, tuple[str, ...]] = {
    "reference": ("none", "full"),
    "fused": ("none", "mlp", "full", "offload"),
    "fp8": ("none", "mlp", "full", "offload"),
}


def choose_kernels(compute: Compute, quantization: Quantization, lora: Lora) -> Kernels:
    """The kernels that compute.kernels means on this machine; `auto`: fused where they can run. Says which and why.

    Raises:
        InputError: fused or fp8 was asked for and cannot run.
    """
    wanted = "fused" if compute.kernels == "auto" else compute.kernels
    obstacle = "" if wanted == "reference" else _obstacle(wanted, compute, quantization, lora)
    if obstacle and compute.kernels != "auto":
        raise InputError(
            f"compute.kernels: {compute.kernels!r} cannot run here: {obstacle}; choose 'auto' or 'reference'"
            + (" or 'fused'" if wanted == "fp8" and not _obstacle("fused", compute, quantization, lora) else "")
        )
    runs: Kernels = "reference" if obstacle else wanted
    log.info("kernels: %s asked for, %s runs%s", compute.kernels, runs, f" ({obstacle})" if obstacle else "")
    return runs


def _obstacle(wanted: str, compute: Compute, quantization: Quantization, lora: Lora) -> str:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    needed = (8, 9) if wanted == "fp8" else (8, 0)
    if capability < needed:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, {needed[0]}.{needed[1]} is needed"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if compute_dtype(compute) != torch.bfloat16:
        return "they compute in bfloat16 only (compute.compute_dtype)"
    if quantization.bits != 4:
        return f"they need a base of 4 bits, quantization.bits is {quantization.bits}"
    if lora.use_dora:
        return "they do not compute DoRA (lora.use_dora)"
    from pdf2lora.model.kernels.lora import LARGEST_RANK

    if lora.r > LARGEST_RANK:
        return f"they hold ranks up to {LARGEST_RANK}, lora.r is {lora.r}"
    return ""


def checkpointing_modes(train: Train, kernels: Kernels) -> tuple[str, ...]:
    """The values of gradient_checkpointing to choose among, from the fastest step to the smallest.

    `auto` leaves the choice to find_batch on a GPU; on a CPU it is full, so that every CPU makes the same one.

    Raises:
        InputError: the kernels do not know the one that was asked for.
    """
    known = CHECKPOINTING[kernels]
    if train.gradient_checkpointing == "auto":
        return known if torch.cuda.is_available() else ("full",)
    if train.gradient_checkpointing not in known:
        raise InputError(
            f"train.gradient_checkpointing: {train.gradient_checkpointing!r} is not possible with the {kernels} "
            f"kernels; choose {', '.join(known)} or auto"
        )
    return (train.gradient_checkpointing,)
