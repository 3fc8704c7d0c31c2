"""The values that all layers share in one forward pass and its backward pass."""

from typing import NamedTuple

from torch import Tensor

from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.rotary import Angles


class ForwardContext(NamedTuple):
    """dropout_state: DropoutState.tensor; None: no dropout."""

    gradient_checkpointing: GradientCheckpointing
    heads: Heads
    angles: Angles
    dropout_state: Tensor | None
    fp8: bool
    offload: Offload

    @property
    def recomputes_attention(self) -> bool:
        return self.gradient_checkpointing in (GradientCheckpointing.FULL, GradientCheckpointing.OFFLOAD)

    @property
    def recomputes_mlp(self) -> bool:
        return self.gradient_checkpointing is not GradientCheckpointing.NONE
