"""The setting train.gradient_checkpointing: which activations the backward pass recomputes."""

from enum import StrEnum

from pdf2lora.errors import InputError
from pdf2lora.model.kernel_choice import Kernels
from pdf2lora.params import Train


class GradientCheckpointing(StrEnum):
    """Sorted from the fastest step to the one with the smallest memory. kernels/decoder.py lists bytes per token."""

    NONE = "none"  # recomputes nothing
    MLP = "mlp"  # recomputes the second RMSNorm and the gate and up projections
    FULL = "full"  # keeps the input of each layer
    OFFLOAD = "offload"  # keeps the input of each layer in host memory


SUPPORTED_GRADIENT_CHECKPOINTING: dict[Kernels, tuple[GradientCheckpointing, ...]] = {
    "reference": (GradientCheckpointing.NONE, GradientCheckpointing.FULL),
    "fused": tuple(GradientCheckpointing),
    "fp8": tuple(GradientCheckpointing),
}


def gradient_checkpointing_choices(train: Train, kernels: Kernels) -> tuple[GradientCheckpointing, ...]:
    """The values that find_batch searches, from the fastest step to the one with the smallest memory.

    Raises InputError if the kernels do not support the value of train.gradient_checkpointing.
    """
    supported = SUPPORTED_GRADIENT_CHECKPOINTING[kernels]
    if train.gradient_checkpointing == "auto":
        return supported
    if train.gradient_checkpointing not in supported:
        raise InputError(
            f"train.gradient_checkpointing is {train.gradient_checkpointing!r}; the {kernels} kernels do not support "
            f"it. Use {', '.join(supported)} or auto."
        )
    return (GradientCheckpointing(train.gradient_checkpointing),)
