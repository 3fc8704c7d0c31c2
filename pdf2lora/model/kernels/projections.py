"""One to three projections that read the same x: their frozen product, and LoRA for those that have it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdf2lora.model.dropout import DropoutRate
from pdf2lora.model.kernels import fp8_lora, lora, rotary
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.dequantize import Lora
from pdf2lora.model.kernels.fp8_lora import LoraColumns
from pdf2lora.model.kernels.frozen import Frozen, Weights
from pdf2lora.model.kernels.lora import DropoutCounter, LowRank
from pdf2lora.model.kernels.lora_copies import copy_lora
from pdf2lora.model.kernels.lora_products import both_products, one_kernel_is_faster, product_float32
from pdf2lora.model.kernels.rmsnorm import add_rmsnorm
from pdf2lora.model.kernels.rows import Format, Rows


class Adapter(NamedTuple):
    """PEFT's matrices of one projection, and the position of their copies in Projections.a and Projections.b.

    ranks: rows of Projections.a and columns of Projections.b, with the padding; features: rows of Projections.b.
    """

    module: Any
    a: Tensor  # (r, features in), float32
    b: Tensor  # (features out, r), float32
    scaling: float
    ranks: slice
    features: slice


class GradLowRank(NamedTuple):
    """The gradient of LoRA's first product, and of B if one kernel computed both.

    values: (tokens, ranks of all); of_b: for each adapter (features out, padded rank), float32, without the scaling.
    """

    values: Tensor
    of_b: list[Tensor] | None = None


class Projections:
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T, with stacked W, A and B of all projections.

    a: (ranks of all, features in). Each rank is padded with zeros to a size that tensor cores accept.
    b: (features out of all, ranks of all), times the scaling. Zeros outside of each projection's own block.
    a_norms, b_norms: of the rows of a and the columns of b, (ranks of all,), float32, for fp8.
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        """modules: PEFT's LoRA layers; for a projection without LoRA, bitsandbytes' Linear4bit or torch's Linear."""
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
                slices = slice(first_rank, first_rank + self.rank), slice(first_row, first_row + num_rows)
                self.adapters.append(Adapter(module, *matrices, module.scaling["default"], *slices))
            first_row += num_rows
        width, device = len(with_lora) * self.rank, self.adapters[0].a.device
        self.a = torch.zeros(width, self.frozen.shape[1], dtype=dtype, device=device)
        self.b = torch.zeros(self.frozen.shape[0], width, dtype=dtype, device=device)
        self.a_norms, self.b_norms = torch.zeros(2, width, device=device)
        loras: dict[int, Lora] = {}  # views of a and b
        for adapter in self.adapters:
            loras[id(adapter.module)] = Lora(self.a[adapter.ranks], self.b[adapter.features, adapter.ranks])
        self.loras = [loras.get(id(module)) for module in modules]

    @property
    def parameters(self) -> list[Tensor]:
        return [matrix for adapter in self.adapters for matrix in (adapter.a, adapter.b)]

    @property
    def has_lora(self) -> bool:
        """True if LoRA is active. PEFT's disable_adapter() turns it off."""
        return bool(self.adapters) and not any(getattr(module, "disable_adapters", False) for module in self.modules)

    def format(self, context: ForwardContext) -> Format:
        """Of x, for forward()."""
        return self._format(context, lora_columns=self.has_lora)

    def grad_format(self, context: ForwardContext) -> Format:
        """Of the gradient of y, for backward(). It has LoRA's columns only without dropout.

        With dropout, the mask also multiplies LoRA's part of the gradient of x, so this part needs its own kernel.
        """
        return self._format(context, lora_columns=self.has_lora and not self._has_dropout(context))

    def _format(self, context: ForwardContext, *, lora_columns: bool) -> Format:
        columns = fp8_lora.num_columns(len(self.a)) if context.fp8 and lora_columns else 0
        return Format(values=self.has_lora or not context.fp8, fp8=context.fp8, lora_columns=columns)

    @property
    def up(self) -> rotary.Up | None:
        """B for rotary_backward, of the projections of q, k and v. None: LoRA is off or its rank is too large."""
        if not self.has_lora or self.rank > rotary.MAX_FUSED_ROTARY_RANK:
            return None
        first_ranks = {id(adapter.module): adapter.ranks.start for adapter in self.adapters}
        q, k, v = (first_ranks.get(id(module), -1) for module in self.modules)
        return rotary.Up(self.b, (q, k, v), self.rank)

    def normalize(
        self, norm: Any, residual: Tensor, update: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Rows, Tensor]:
        """add_rmsnorm with the layer's RMSNorm `norm`. The rows have the formats that forward() reads."""
        return add_rmsnorm(residual, update, norm.weight, norm.variance_epsilon, self.format(context))

    def weights(self, context: ForwardContext) -> Weights:
        """For forward() and backward(), which make their own if they get none."""
        loras = self.loras if self._is_merged(context) else ()
        output_columns = LoraColumns(self.b, self.a_norms) if self.format(context).lora_columns else None
        input_columns = LoraColumns(self.a.t(), self.b_norms) if self.grad_format(context).lora_columns else None
        return Weights(self.frozen, loras, output_columns=output_columns, input_columns=input_columns)

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
            fp8_lora.append(x, low_rank.values, self.a_norms)
            return self.frozen.forward(x, weights, out), low_rank
        assert x.values is not None
        # The small product first: the large one then adds to it at little cost.
        small = self.frozen.add_bias(low_rank.values, self.b.t(), out)
        return small.addmm_(x.values, weights.values.t()), low_rank

    def low_rank(self, x: Rows, context: ForwardContext) -> LowRank:
        """LoRA's first product, (tokens, features in) -> (tokens, ranks of all)."""
        assert x.values is not None
        if not self._has_dropout(context):
            return LowRank(x.values @ self.a.t(), None)
        assert context.dropout_state is not None
        counter = DropoutCounter(
            context.dropout_state, self.layer_index, context.heads.seq_length, self.dropout_rate, x.first_token
        )
        return LowRank(*lora.down(x.values, self.a, self.rank, counter))

    def refresh(self, context: ForwardContext) -> None:
        """Copies PEFT's float32 matrices, which the optimizer has changed, to `a` and `b`."""
        for adapter in self.adapters:
            a_copy, b_copy = self.a[adapter.ranks], self.b[adapter.features, adapter.ranks]
            copy_lora(adapter.a, adapter.b, adapter.scaling, a_copy, b_copy)
        if self.adapters and context.fp8:
            torch.linalg.vector_norm(self.a, dim=1, dtype=torch.float32, out=self.a_norms)
            torch.linalg.vector_norm(self.b, dim=0, dtype=torch.float32, out=self.b_norms)

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
        grad_low_rank: GradLowRank | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of x, gradients of `parameters` in float32). Without grad_x the first is None.

        low_rank: of forward(). grad_low_rank: of the caller if it has computed it.
        """
        if grad_low_rank is None:
            grad_low_rank = self.grad_low_rank(grad, low_rank)
        weights = weights or self.weights(context)
        dx = self.input_gradient(grad, low_rank, grad_low_rank, weights, out) if grad_x else None
        return dx, self.matrix_gradients(grad, x, low_rank, grad_low_rank)

    def grad_low_rank(self, grad: Rows, low_rank: LowRank | None) -> GradLowRank | None:
        """For input_gradient(), which needs it if forward() has returned LoRA's first product."""
        if low_rank is None:
            return None
        assert grad.values is not None
        return self._grad_low_rank(grad.values, low_rank.values)

    def _grad_low_rank(self, grad: Tensor, low_rank: Tensor) -> GradLowRank:
        parts = [grad[:, adapter.features] for adapter in self.adapters]
        if not all(one_kernel_is_faster(part, self.rank) for part in parts):
            return GradLowRank(grad @ self.b)
        products = [
            both_products(part, self.b[adapter.features, adapter.ranks], low_rank[:, adapter.ranks])
            for part, adapter in zip(parts, self.adapters, strict=True)
        ]
        return GradLowRank(torch.cat([values for values, _ in products], dim=1), [of_b.t() for _, of_b in products])

    def input_gradient(
        self,
        grad: Rows,
        low_rank: LowRank | None,
        grad_low_rank: GradLowRank | None,
        weights: Weights,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x: (tokens, features in). Does not read x."""
        if weights.input_columns is not None:
            assert grad_low_rank is not None
            fp8_lora.append(grad, grad_low_rank.values, self.b_norms)
        dx = self.frozen.backward(grad, weights, out)
        if low_rank is not None and low_rank.mask is not None:
            assert grad_low_rank is not None
            scale = self.dropout_rate.scale
            lora.add_gradient_of_x_(dx, self.a, grad_low_rank.values, self.rank, low_rank.mask, scale)
        return dx

    def matrix_gradients(
        self, grad: Rows, x: Tensor | None, low_rank: LowRank | None, grad_low_rank: GradLowRank | None
    ) -> list[Tensor]:
        """The gradients of `parameters`, float32.

        low_rank, grad_low_rank: None if they are still to be computed.
        """
        if not self.has_lora:
            return []
        grad_y = grad.values
        assert grad_y is not None
        assert x is not None
        grad_a = None
        if low_rank is None:  # both are unknown, so one kernel can read x, or the gradient of y if that is wider
            if len(self.adapters) == 1 and x.shape[1] >= grad_y.shape[1] and one_kernel_is_faster(x, self.rank):
                grad_low_rank = grad_low_rank or GradLowRank(grad_y @ self.b)
                values, grad_a = both_products(x, self.a.t(), grad_low_rank.values)
            else:
                values = x @ self.a.t()
            low_rank = LowRank(values, None)
        grad_low_rank = grad_low_rank or self._grad_low_rank(grad_y, low_rank.values)
        if grad_a is None:
            grad_a = self._gradient_of_a(x, grad_low_rank.values, low_rank.mask)
        grad_b = grad_low_rank.of_b
        if grad_b is None:
            stacked = product_float32(grad_y.t(), low_rank.values)
            grad_b = [stacked[adapter.features, adapter.ranks] for adapter in self.adapters]
        gradients = []
        for adapter, of_b in zip(self.adapters, grad_b, strict=True):
            r = len(adapter.a)
            gradients += [grad_a[adapter.ranks][:r], of_b[:, :r] * adapter.scaling]
        return gradients

    def _gradient_of_a(self, x: Tensor, grad_low_rank: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return product_float32(grad_low_rank.t(), x)
        return lora.gradient_of_a(x, grad_low_rank, self.rank, mask, self.dropout_rate.scale)
