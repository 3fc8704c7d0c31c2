"""One to three projections that read the same x: their frozen product, and the LoRA of those that have one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdf2lora.model.kernels import lora, rotary
from pdf2lora.model.kernels.frozen import Frozen
from pdf2lora.model.kernels.lora import LowRank
from pdf2lora.model.kernels.rows import Rows

NO_DROPOUT = lora.Dropout(0.0)


class Adapter(NamedTuple):
    """PEFT's matrices of one projection, and where their copies in compute precision stand among the projections'."""

    module: Any
    a: Tensor  # (r, features in), float32
    b: Tensor  # (features of the projection, r), float32
    scaling: float
    rank: slice  # of the rows of Projections.a and the columns of Projections.b
    rows: slice  # of the rows of Projections.b: the projection's part of the product


class Projections:
    """y = x W^T + scaling * (dropout(x) A^T) B^T, W, A and B of all projections stacked.

    A stacks the ranks, filled up with zeros to what a tensor core takes; B has each projection's matrix at its own rows
    and ranks, times its scaling, and zeros elsewhere.
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        """modules: PEFT's LoRA layers, or bitsandbytes' Linear4bit where a projection has no LoRA."""
        self.modules = modules
        self.frozen = Frozen([getattr(module, "base_layer", module) for module in modules], dtype)
        with_lora = [module for module in modules if hasattr(module, "lora_A")]
        self.adapters: list[Adapter] = []
        if not with_lora:
            return
        r = with_lora[0].r["default"]
        self.rank = max(16, 1 << (r - 1).bit_length())
        self.dropout = lora.Dropout(getattr(with_lora[0].lora_dropout["default"], "p", 0.0))
        first_row = 0
        for module, num_rows in zip(modules, self.frozen.rows, strict=True):
            if module in with_lora:
                first_rank = len(self.adapters) * self.rank
                matrices = module.lora_A["default"].weight, module.lora_B["default"].weight
                rank, rows = slice(first_rank, first_rank + r), slice(first_row, first_row + num_rows)
                self.adapters.append(Adapter(module, *matrices, module.scaling["default"], rank, rows))
            first_row += num_rows
        width, device = len(with_lora) * self.rank, self.adapters[0].a.device
        self.a = torch.zeros(width, self.frozen.shape[1], dtype=dtype, device=device)
        self.b = torch.zeros(self.frozen.shape[0], width, dtype=dtype, device=device)

    @property
    def parameters(self) -> list[Tensor]:
        return [matrix for adapter in self.adapters for matrix in (adapter.a, adapter.b)]

    @property
    def has_lora(self) -> bool:
        """Whether LoRA counts in now: PEFT's disable_adapter() turns it off for a while."""
        return bool(self.adapters) and not any(getattr(module, "disable_adapters", False) for module in self.modules)

    def needs_values(self, fp8: bool) -> bool:
        """Whether x, or the gradient of y, must be there in compute precision: LoRA does not read fp8."""
        return self.has_lora or not fp8

    @property
    def up(self) -> rotary.Up | None:
        """What rotary.rotary_backward multiplies by, where these are the projections of q, k and v; None: nothing."""
        if not self.has_lora or self.rank > rotary.LARGEST_RANK:
            return None
        first_ranks = {id(adapter.module): adapter.rank.start for adapter in self.adapters}
        q, k, v = (first_ranks.get(id(module), -1) for module in self.modules)
        return rotary.Up(self.b, (q, k, v), self.rank)

    def forward(self, x: Rows, seed: int | None) -> tuple[Tensor, LowRank | None]:
        """(y, what backward needs); x: (tokens, features in). Without a seed there is no dropout."""
        low_rank = self.low_rank(x.values, seed)
        if low_rank is None:
            return self.frozen.forward(x), None
        if x.fp8 is not None:
            return self.frozen.forward(x).addmm_(low_rank.values, self.b.t()), low_rank
        assert x.values is not None
        # the other way round: a large product hides that it reads what it adds to
        return (low_rank.values @ self.b.t()).addmm_(x.values, self.frozen.weight().t()), low_rank

    def low_rank(self, x: Tensor | None, seed: int | None) -> LowRank | None:
        """LoRA's first product, (tokens, features in) -> (tokens, ranks of all); None where there is no LoRA."""
        if not self.has_lora:
            return None
        assert x is not None
        return lora.down(x, self.a, self.rank, NO_DROPOUT if seed is None else self.dropout, seed or 0)

    def refresh(self) -> None:
        """Copies PEFT's float32 matrices, as the optimizer left them, to where the products of this pass read them."""
        for adapter in self.adapters:
            self.a[adapter.rank].copy_(adapter.a)
            torch.mul(adapter.b, adapter.scaling, out=self.b[adapter.rows, adapter.rank])

    def backward(
        self,
        grad: Rows,
        x: Tensor | None,
        low_rank: LowRank | None,
        *,
        grad_x: bool = True,
        grad_low_rank: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of x, gradients of `parameters` in float32); without grad_x the first is None.

        grad_low_rank: grad B, (tokens, ranks of all), where it is known already.
        """
        dx = self.frozen.backward(grad) if grad_x else None
        if low_rank is None:
            return dx, []
        assert grad.values is not None
        assert x is not None
        if grad_low_rank is None:
            grad_low_rank = grad.values @ self.b
        grad_b = grad.values.t() @ low_rank.values
        scale = 1.0 if low_rank.mask is None else self.dropout.scale
        grad_a = lora.backward_(x, dx, self.a, grad_low_rank, self.rank, low_rank.mask, scale)
        gradients = []
        for adapter in self.adapters:
            grad_of_b = grad_b[adapter.rows, adapter.rank].float() * adapter.scaling
            gradients += [grad_a[adapter.rank], grad_of_b]
        return dx, gradients
