"""A decoder layer (pdf2lora/model/architectures.py) as one autograd function with a hand-written backward pass.

With autograd, gradients of one tensor from several projections need extra additions, activations that are cheap to
recompute stay in memory, and checkpointing recomputes too much. Here
- RMSNorm adds the residual, in both passes,
- one product gives the gradient of the input of several projections,
- gradients overwrite activations that are no longer needed,
- `GradientCheckpointing` selects the activations that stay in memory between the passes:

    value     bytes per token and layer (3B)   recomputed in the backward pass
    NONE      68 K                             nothing
    MLP       36 K                             RMSNorm, gate and up projections
    FULL       6 K                             all but the down projection
    OFFLOAD    0 (6 K in host memory)          the same

  From sequences of LONG_SEQUENCE tokens on, FULL and OFFLOAD also keep attention's output (6 K more).

A layer reads and returns its residual stream as two summands, so that the next RMSNorm computes the sum.
"""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.mlp import Mlp, MlpActivations
from pdf2lora.model.kernels.rmsnorm import add_rmsnorm, rmsnorm_backward_
from pdf2lora.model.kernels.self_attention import AttentionActivations, SelfAttention
from pdf2lora.model.layer_stream import LayerStream


class DecoderLayer:
    """One layer of a PeftModel's decoder. Refers to the PeftModel's weights and LoRA matrices."""

    def __init__(self, number: int, layer: Any, dtype: torch.dtype, stream: LayerStream | None = None):
        """stream: of the frozen weights, if they are in host memory."""
        self.number, self.stream = number, stream
        self.attention, self.mlp = SelfAttention(number, layer, dtype), Mlp(layer, dtype)
        self.projections = [self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down]

    def __call__(self, residual: Tensor, update: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Two tensors (tokens, hidden), whose sum is the layer's input -> two whose sum is its output."""
        parameters = [parameter for projections in self.projections for parameter in projections.parameters]
        result: tuple[Tensor, Tensor] = _Layer.apply(residual, update, self, context, *parameters)
        return result

    def load(self, *, backward: bool = False) -> None:
        """Waits for the frozen weights if they come from host memory."""
        if self.stream is not None:
            self.stream.load(self.number, backward=backward)


class _Layer(torch.autograd.Function):
    """(residual, update) -> (residual, update). The sums are the layer's input and output."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        update: Tensor | None,
        layer: DecoderLayer,
        context: ForwardContext,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attention, mlp = AttentionActivations(), MlpActivations()
        layer.load()
        for projections in layer.projections:
            projections.refresh(context)
        update = layer.attention.forward(residual, update, context, attention)
        total = attention.total
        if any(ctx.needs_input_grad):
            layer.attention.drop(context, attention)
            ctx.layer, ctx.context, ctx.attention, ctx.mlp = layer, context, attention, mlp
        del attention
        total = layer.mlp.normalize(total, update, context, mlp)
        del update
        return total, layer.mlp.forward(context, mlp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, same_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Both summands have the gradient of their sum. The next layer returns it twice.
        assert grad.data_ptr() == same_grad.data_ptr()
        layer, context, attention, mlp = ctx.layer, ctx.context, ctx.attention, ctx.mlp
        del ctx.attention, ctx.mlp
        layer.load(backward=True)
        if context.recomputes_layer:
            update = layer.attention.restore(context, attention)
            layer.mlp.normalize(attention.total, update, context, mlp)
            del update
        elif context.recomputes_mlp:
            layer.mlp.normalize(mlp.total, None, context, mlp)

        d_total, d_mlp = layer.mlp.backward(grad, context, mlp, layer.attention.o.grad_format(context))
        del mlp
        d_input, d_attention = layer.attention.backward(d_total, context, attention, grad_input=ctx.needs_input_grad[0])
        d_update = d_input if ctx.needs_input_grad[1] else None
        return d_input, d_update, None, None, *d_attention, *d_mlp


class FinalNorm(torch.autograd.Function):
    """RMSNorm of residual + update, both (tokens, hidden)."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, update: Tensor, norm: Any) -> Tensor:
        total, x, rstd = add_rmsnorm(residual, update, norm.weight, norm.variance_epsilon)
        ctx.norm = norm
        ctx.save_for_backward(total, rstd)
        assert x.values is not None
        return x.values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd = ctx.saved_tensors
        d_total = rmsnorm_backward_(grad.clone(), total, rstd, ctx.norm.weight, None).values
        return d_total, d_total, None
