"""Checks that this machine reads 4-bit weights back correctly."""

from pdf2lora.errors import InputError
from pdf2lora.params import Params
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import ModelShape

BLOCK_SIZE = 64  # weights that share a scale in 4 bits; only other widths can fail


def four_bit_weights(params: Params, shape: ModelShape, *, has_gpu: bool) -> list[Finding]:
    """Checks the model's widths as the stages do. Returns no finding if the check cannot fail.

    Imports torch, which takes about five seconds.
    """
    widths = {num_inputs for num_inputs, _ in shape.layers.values()}
    if has_gpu or params.quantization.bits != 4 or all(width % BLOCK_SIZE == 0 for width in widths):
        return []
    from pdf2lora.model.device import compute_dtype
    from pdf2lora.model.quantization import check_4bit_round_trip

    try:
        check_4bit_round_trip(widths, params.quantization.bnb_4bit_quant_type, compute_dtype(params.compute))
    except InputError as error:
        return [Finding("problem", "4-bit weights", str(error))]
    return [Finding("ok", "4-bit weights", "this machine reads them back correctly")]
