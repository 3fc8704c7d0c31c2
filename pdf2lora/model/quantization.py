"""bitsandbytes' quantization: its configuration, and checks that it works on this machine."""

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig

from pdf2lora.errors import InputError
from pdf2lora.model.device import device
from pdf2lora.params import Quantization

ROUND_TRIP_TOLERANCE = 0.01  # of the largest weight


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The configuration for transformers; None for 16 bits. dtype: of the products with dequantized weights."""
    match quantization.bits:
        case 4:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
                bnb_4bit_compute_dtype=dtype,
            )
        case 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        case _:
            return None


def require_quantization(bits: int) -> None:
    """Quantizes a few numbers. If bitsandbytes has no kernels for this machine, it fails before a model is loaded.

    Raises InputError if bitsandbytes cannot quantize.
    """
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
            f"quantization.bits is {bits}, which does not work here: bitsandbytes {bnb.__version__} fails on "
            f"{device().type} with '{' '.join(str(error).split())[:200]}'. Install a build of bitsandbytes for this "
            "machine, or use 16."
        ) from error


def check_4bit_round_trip(widths: set[int], quant_type: str, dtype: torch.dtype) -> None:
    """Quantizes random weights to 4 bits, dequantizes them with bitsandbytes, and compares with plain arithmetic.

    bitsandbytes 0.50.2 has a fault on CPUs with AVX512: it assumes that each row starts a new block. But blocks have 64
    weights and cross rows. So if the width is a multiple of 16 and not of 64, most rows get the scales of other blocks.
    Products and gradients had errors of 16% to 48%.

    widths: numbers of input features of the model's layers.

    Raises InputError if dequantized weights differ from the stored ones.
    """
    if device().type != "cpu":
        return
    generator = torch.Generator().manual_seed(0)  # does not advance the global generator
    for width in sorted(widths):
        weights = torch.randn(32, width, generator=generator).to(dtype)
        packed, state = bnb.functional.quantize_4bit(weights, quant_type=quant_type)
        dequantized = bnb.functional.dequantize_4bit(packed, state)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
        scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
        stored = (state.code[codes] * scales).view_as(dequantized)
        error = ((dequantized - stored).abs().max() / stored.abs().max()).item()
        if not error < ROUND_TRIP_TOLERANCE:  # also true for NaN
            raise InputError(
                f"quantization.bits is 4, which does not work here for layers with {width} input features: "
                f"bitsandbytes {bnb.__version__} on this CPU dequantizes weights with an error of {error:.0%} of the "
                "largest weight. Use 8 or 16, or run on a GPU."
            )
