"""One to three projections that read the same x: their frozen product, and LoRA for those that have it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdf2lora.model.dropout import DropoutRate
from pdf2lora.model.kernels import lora, rotary
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.dequantize import Lora
from pdf2lora.model.kernels.frozen import Frozen, Weights
from pdf2lora.model.kernels.lora import DropoutCounter, LowRank
from pdf2lora.model.kernels.rmsnorm import add_rmsnorm
from pdf2lora.model.kernels.rows import Rows


class Adapter(NamedTuple):
    """PEFT's matrices of one projection, and the position of their copies in Projections.a and Projections.b."""

    module: Any
    a: Tensor  # (r, features in), float32
    b: Tensor  # (features out, r), float32
    scaling: float
    rank_slice: slice  # rows of Projections.a, columns of Projections.b
    feature_slice: slice  # rows of Projections.b, columns of the product


class Projections:
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T, with stacked W, A and B of all projections.

    a: (ranks of all, features in). Each rank is padded with zeros to a size that tensor cores accept.
    b: (features out of all, ranks of all), times the scaling. Zeros outside of each projection's own block.
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        """modules: PEFT's LoRA layers, or bitsandbytes' Linear4bit for a projection without LoRA."""
        self.modules = modules
        self.frozen = Frozen([getattr(module, "base_layer", module) for module in modules], dtype)
        with_lora = [module for module in modules if hasattr(module, "lora_A")]
        self.adapters: list[Adapter] = []
        if not with_lora:
            return
        r = with_lora[0].r["default"]
        self.rank = max(16, 1 << (r - 1).bit_length())
        dropouts = [module.lora_dropout["default"] for module in with_lora]
        self.dropout_rate = DropoutRate(getattr(dropouts[0], "p", 0.0))
        indices = [getattr(dropout, "layer_index", number) for number, dropout in enumerate(dropouts)]
        self.layer_index = indices[0]
        assert indices == list(range(self.layer_index, self.layer_index + len(indices)))  # as lora._down counts
        first_row = 0
        for module, num_rows in zip(modules, self.frozen.rows, strict=True):
            if module in with_lora:
                first_rank = len(self.adapters) * self.rank
                matrices = module.lora_A["default"].weight, module.lora_B["default"].weight
                slices = slice(first_rank, first_rank + r), slice(first_row, first_row + num_rows)
                self.adapters.append(Adapter(module, *matrices, module.scaling["default"], *slices))
            first_row += num_rows
        width, device = len(with_lora) * self.rank, self.adapters[0].a.device
        self.a = torch.zeros(width, self.frozen.shape[1], dtype=dtype, device=device)
        self.b = torch.zeros(self.frozen.shape[0], width, dtype=dtype, device=device)
        loras: dict[int, Lora] = {}  # views of a and b
        for adapter in self.adapters:
            ranks = slice(adapter.rank_slice.start, adapter.rank_slice.start + self.rank)
            loras[id(adapter.module)] = Lora(self.a[ranks], self.b[adapter.feature_slice, ranks])
        self.loras = [loras.get(id(module)) for module in modules]

    @property
    def parameters(self) -> list[Tensor]:
        return [matrix for adapter in self.adapters for matrix in (adapter.a, adapter.b)]

    @property
    def has_lora(self) -> bool:
        """Whether LoRA is active: PEFT's disable_adapter() turns it off."""
        return bool(self.adapters) and not any(getattr(module, "disable_adapters", False) for module in self.modules)

    def needs_values(self, fp8: bool) -> bool:
        """Whether x, or the gradient of y, is needed in compute precision: LoRA does not read fp8."""
        return self.has_lora or not fp8

    @property
    def up(self) -> rotary.Up | None:
        """B for rotary_backward, of the projections of q, k and v. None: LoRA is off or its rank is too large."""
        if not self.has_lora or self.rank > rotary.MAX_FUSED_ROTARY_RANK:
            return None
        first_ranks = {id(adapter.module): adapter.rank_slice.start for adapter in self.adapters}
        q, k, v = (first_ranks.get(id(module), -1) for module in self.modules)
        return rotary.Up(self.b, (q, k, v), self.rank)

    def normalize(
        self, norm: Any, residual: Tensor, update: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Rows, Tensor]:
        """add_rmsnorm with the layer's RMSNorm `norm`. The rows have the formats that forward() reads."""
        values = self.needs_values(context.fp8)
        return add_rmsnorm(residual, update, norm.weight, norm.variance_epsilon, values=values, fp8=context.fp8)

    def weights(self, context: ForwardContext) -> Weights:
        """For forward() and backward(), which make their own if they get none."""
        return Weights(self.frozen, self.loras if self._is_merged(context) else ())

    def _is_merged(self, context: ForwardContext) -> bool:
        """True if weights() adds LoRA's product to the weights. forward() then computes no product for LoRA."""
        return self.has_lora and not context.fp8 and not self._has_dropout(context)

    def _has_dropout(self, context: ForwardContext) -> bool:
        return context.dropout_state is not None and self.dropout_rate.threshold > 0

    def forward(
        self, x: Rows, context: ForwardContext, weights: Weights | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, LowRank | None]:
        """(y, LoRA's first product for the backward pass, None if LoRA is off or merged). x: (tokens, features in)."""
        weights = weights or self.weights(context)
        if not self.has_lora or self._is_merged(context):
            return self.frozen.forward(x, weights, out), None
        low_rank = self.low_rank(x, context)
        if x.fp8 is not None:
            return self.frozen.forward(x, weights, out).addmm_(low_rank.values, self.b.t()), low_rank
        assert x.values is not None
        # The small product first: the large one then adds to it at little cost.
        small = self.frozen.add_bias(low_rank.values, self.b.t(), out)
        return small.addmm_(x.values, weights.values.t()), low_rank

    def low_rank(self, x: Rows, context: ForwardContext) -> LowRank:
        """LoRA's first product, (tokens, features in) -> (tokens, ranks of all)."""
        assert x.values is not None
        counter = None
        if context.dropout_state is not None:
            counter = DropoutCounter(
                context.dropout_state, self.layer_index, context.heads.seq_length, self.dropout_rate, x.first_token
            )
        return lora.down(x.values, self.a, self.rank, counter)

    def refresh(self) -> None:
        """Copies PEFT's float32 matrices, which the optimizer has changed, to `a` and `b`."""
        for adapter in self.adapters:
            self.a[adapter.rank_slice].copy_(adapter.a)
            torch.mul(adapter.b, adapter.scaling, out=self.b[adapter.feature_slice, adapter.rank_slice])

    def backward(
        self,
        grad: Rows,
        x: Tensor | None,
        low_rank: LowRank | None,
        context: ForwardContext,
        *,
        weights: Weights | None = None,
        out: Tensor | None = None,
        grad_x: bool = True,
        grad_low_rank: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of x, gradients of `parameters` in float32). Without grad_x the first is None.

        low_rank: of forward(). grad_low_rank: of the caller if it has computed it.
        """
        if grad_low_rank is None:
            grad_low_rank = self.grad_low_rank(grad)
        weights = weights or self.weights(context)
        dx = self.input_gradient(grad, low_rank, grad_low_rank, weights, out) if grad_x else None
        return dx, self.matrix_gradients(grad, x, low_rank, grad_low_rank)

    def grad_low_rank(self, grad: Rows) -> Tensor | None:
        """The gradient of LoRA's first product, grad B: (tokens, ranks of all). None if LoRA is off."""
        if not self.has_lora:
            return None
        assert grad.values is not None
        return grad.values @ self.b

    def input_gradient(
        self,
        grad: Rows,
        low_rank: LowRank | None,
        grad_low_rank: Tensor | None,
        weights: Weights,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x: (tokens, features in). Does not read x."""
        dx = self.frozen.backward(grad, weights, out)
        if low_rank is not None and grad_low_rank is not None:
            lora.add_gradient_of_x_(dx, self.a, grad_low_rank, self.rank, low_rank.mask, self._scale(low_rank))
        return dx

    def matrix_gradients(
        self, grad: Rows, x: Tensor | None, low_rank: LowRank | None, grad_low_rank: Tensor | None
    ) -> list[Tensor]:
        """The gradients of `parameters`, float32."""
        if grad_low_rank is None:
            return []
        assert grad.values is not None
        assert x is not None
        if low_rank is None:
            low_rank = lora.down(x, self.a, self.rank, None)
        grad_b = grad.values.t() @ low_rank.values
        grad_a = lora.gradient_of_a(x, grad_low_rank, self.rank, low_rank.mask, self._scale(low_rank))
        gradients = []
        for adapter in self.adapters:
            block = grad_b[adapter.feature_slice, adapter.rank_slice]
            gradients += [grad_a[adapter.rank_slice], block.float() * adapter.scaling]
        return gradients

    def _scale(self, low_rank: LowRank) -> float:
        return 1.0 if low_rank.mask is None else self.dropout_rate.scale
