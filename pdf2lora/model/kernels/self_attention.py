"""The first half of a decoder layer: RMSNorm, q, k and v, rotary embedding, attention, o."""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.kernels import attention
from pdf2lora.model.kernels.activations import Activations
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.lora import LowRank
from pdf2lora.model.kernels.projections import GradLowRank, Projections
from pdf2lora.model.kernels.rmsnorm import rmsnorm_backward_
from pdf2lora.model.kernels.rotary import Angles, HeadNorm, normalize_and_rotate, rotary_backward, rotate_
from pdf2lora.model.kernels.rows import Rows, as_rows


class AttentionActivations(Activations):
    """Activations for the backward pass."""

    total: Tensor  # residual + update, (tokens, hidden)
    rstd: Tensor  # 1 / RMS of total, (tokens,), float32
    x: Tensor | None  # input of q, k and v; None without LoRA
    qkv: Tensor  # product of q, k and v, (tokens, heads.width); rotated in place without a head norm
    qkv_low_rank: LowRank | None
    attended: attention.Attended
    attention_call: attention.Call  # of `attended`, if its tensors are in host memory
    o_low_rank: LowRank | None


class SelfAttention:
    """The attention of one layer with the RMSNorm before it."""

    def __init__(self, number: int, layer: Any, dtype: torch.dtype):
        block = layer.self_attn
        self.number, self.norm = number, layer.input_layernorm
        self.qkv = Projections([block.q_proj, block.k_proj, block.v_proj], dtype)
        self.o = Projections([block.o_proj], dtype)
        self.uses_rotary = bool(getattr(block, "use_rope", True))
        self.head_norm: HeadNorm | None = None
        if hasattr(block, "q_norm"):
            weight = torch.stack([block.q_norm.weight, block.k_norm.weight]).detach()
            self.head_norm = HeadNorm(weight, block.q_norm.variance_epsilon)

    def forward(
        self, residual: Tensor, update: Tensor | None, context: ForwardContext, activations: AttentionActivations
    ) -> Tensor:
        """The summand that attention adds to activations.total. Skips attention itself if its output was kept."""
        total, x, activations.rstd = self.qkv.normalize(self.norm, residual, update, context)
        activations.total = total.detach()  # total's history can refer to autograd's context: a reference cycle
        activations.x = x.values if self.qkv.has_lora else None
        activations.qkv, activations.qkv_low_rank = self.qkv.forward(x, context)
        del x
        if self.head_norm is None and self.uses_rotary:
            rotate_(activations.qkv, context.angles, context.heads)
        if not hasattr(activations, "attended"):
            activations.attended = attention.forward(self._parts(context, activations), context.heads)
        rows = as_rows(context.heads.rows(activations.attended.output), self.o.format(context))
        result, activations.o_low_rank = self.o.forward(rows, context)
        return result

    def drop(self, context: ForwardContext, activations: AttentionActivations) -> None:
        """Drops, after forward(), what restore() restores."""
        if not context.recomputes_layer:
            return
        activations.drop("x", "rstd", "qkv", "qkv_low_rank", "o_low_rank")
        if context.offloads:
            kept = [activations.total]
            if context.keeps_attended:
                output, logsumexp, activations.attention_call = activations.attended
                kept += [output, logsumexp]
            context.offload.put(self.number, kept)
            activations.drop("total")
        if context.offloads or not context.keeps_attended:
            activations.drop("attended")

    def restore(self, context: ForwardContext, activations: AttentionActivations) -> Tensor:
        """Restores the activations before the backward pass, with the same dropout. Returns attention's summand."""
        if context.offloads:
            activations.total, *kept = context.offload.take(self.number)
            if context.keeps_attended:
                output, logsumexp = kept
                activations.attended = attention.Attended(output, logsumexp, activations.attention_call)
        return self.forward(activations.total, None, context, activations)

    def backward(
        self, grad: Rows, context: ForwardContext, activations: AttentionActivations, *, grad_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of total, gradients of the LoRA matrices). Without grad_input the first is None.

        grad: of total plus attention's summand.
        """
        attended = context.heads.rows(activations.attended.output)
        d_attended, d_o = self.o.backward(grad, attended, activations.o_low_rank, context)
        assert d_attended is not None
        parts = self._parts(context, activations)
        d_heads = attention.backward(d_attended, parts, activations.attended, context.heads)
        del attended, d_attended, parts
        activations.drop("attended")
        d_qkv, grad_low_rank = rotary_backward(
            d_heads, self._angles(context), context.heads, self.qkv.up, activations.qkv, self.head_norm
        )
        activations.drop("qkv")
        del d_heads
        d_x, d_lora = self.qkv.backward(
            as_rows(d_qkv, self.qkv.grad_format(context)),
            activations.x,
            activations.qkv_low_rank,
            context,
            grad_x=grad_input,
            grad_low_rank=None if grad_low_rank is None else GradLowRank(grad_low_rank),
        )
        d_total = None
        if d_x is not None:
            d_total = rmsnorm_backward_(d_x, activations.total, activations.rstd, self.norm.weight, grad.values).values
        return d_total, d_lora + d_o

    def _parts(self, context: ForwardContext, activations: AttentionActivations) -> attention.Parts:
        """Rotated queries and keys, and values. With a head norm, each call computes them again."""
        query, key, value = context.heads.split(activations.qkv)
        if self.head_norm is None:
            return query, key, value
        rows = normalize_and_rotate(activations.qkv, self._angles(context), context.heads, self.head_norm)
        query, key = context.heads.split_queries_and_keys(rows)
        return query, key, value

    def _angles(self, context: ForwardContext) -> Angles | None:
        return context.angles if self.uses_rotary else None
