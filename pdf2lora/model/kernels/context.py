"""The values that all layers share in one forward pass and its backward pass."""

from typing import NamedTuple

from torch import Tensor

from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.rotary import Angles

LONG_SEQUENCE = 8192  # at 16,384 tokens a second computation of attention took 9% of a step (3B, one H200)


class ForwardContext(NamedTuple):
    """dropout_state: DropoutState.tensor; None: no dropout."""

    gradient_checkpointing: GradientCheckpointing
    heads: Heads
    angles: Angles
    dropout_state: Tensor | None
    fp8: bool
    offload: Offload

    @property
    def offloads(self) -> bool:
        return self.gradient_checkpointing is GradientCheckpointing.OFFLOAD

    @property
    def recomputes_layer(self) -> bool:
        """True if the backward pass computes the layer again from its input. keeps_attended leaves out attention."""
        return self.gradient_checkpointing in (GradientCheckpointing.FULL, GradientCheckpointing.OFFLOAD)

    @property
    def recomputes_mlp(self) -> bool:
        return self.gradient_checkpointing is not GradientCheckpointing.NONE

    @property
    def keeps_attended(self) -> bool:
        """True if attention's output is kept for the backward pass. The layer's input is kept too."""
        return self.recomputes_layer and self.heads.seq_length >= LONG_SEQUENCE
