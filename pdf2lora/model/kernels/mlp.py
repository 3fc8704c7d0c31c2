"""The second half of a decoder layer: RMSNorm, gate and up, SwiGLU, down.

gate and up have the largest activations of a model. If the backward pass recomputes them, both passes compute them in
tiles of tokens, so that only those of one tile are in memory.
"""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.kernels.activations import Activations
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.frozen import Weights
from pdf2lora.model.kernels.lora import LowRank
from pdf2lora.model.kernels.projections import Projections
from pdf2lora.model.kernels.rmsnorm import rmsnorm_backward_
from pdf2lora.model.kernels.rows import VALUES, Format, Rows, as_rows
from pdf2lora.model.kernels.swiglu import swiglu, swiglu_backward_

TILES = 4  # of a micro-batch, if the next two numbers allow it
MIN_TOKENS, MAX_TOKENS = 4096, 16384  # of a tile: fewer tokens make the products slower, more need memory


class Tile(Activations):
    """Activations of some tokens for the backward pass."""

    gate_up: Tensor  # (tokens, 2 * intermediate)
    gate_up_low_rank: LowRank | None
    down_low_rank: LowRank | None


class MlpActivations(Activations):
    """Activations of all tokens for the backward pass."""

    total: Tensor  # residual + update, (tokens, hidden)
    rstd: Tensor  # 1 / RMS of total, (tokens,), float32
    x: Rows  # RMSNorm of total; without tensors after forward() if LoRA is off or backward() recomputes it

    def __init__(self) -> None:
        self.tiles: list[Tile] = []


class Mlp:
    """The MLP of one layer with the RMSNorm before it."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        self.norm = layer.post_attention_layernorm
        self.gate_up = Projections([layer.mlp.gate_proj, layer.mlp.up_proj], dtype)
        self.down = Projections([layer.mlp.down_proj], dtype)

    def normalize(
        self, residual: Tensor, update: Tensor | None, context: ForwardContext, activations: MlpActivations
    ) -> Tensor:
        """Sets total, x and rstd before forward(), and before backward() if they were dropped. Returns the total."""
        total, activations.x, activations.rstd = self.gate_up.normalize(self.norm, residual, update, context)
        activations.total = total.detach()  # total's history refers to autograd's context: a reference cycle
        return total

    def forward(self, context: ForwardContext, activations: MlpActivations) -> Tensor:
        """The summand that the MLP adds to the total: (tokens, hidden)."""
        parts = _tiles(len(activations.total), context)
        is_tiled = len(parts) > 1
        down = torch.empty_like(activations.total) if is_tiled else None
        gate_up_weights, down_weights = self._weights(is_tiled, context)
        for tokens in parts:
            tile = Tile()
            self._gate(activations.x.part(tokens), context, gate_up_weights, tile)
            if tokens is parts[-1]:
                self._drop_x(context, activations)
            activated = self._activate(tile, tokens.start, self.down.format(context))
            out = None if down is None else down[tokens]
            result, tile.down_low_rank = self.down.forward(activated, context, down_weights, out)
            if context.recomputes_mlp:
                tile.drop("gate_up", "gate_up_low_rank")
            if context.recomputes_layer and tile.down_low_rank is not None and tile.down_low_rank.mask is not None:
                tile.drop("down_low_rank")  # because its dropout mask needs memory
            activations.tiles.append(tile)
        if context.recomputes_layer:
            activations.drop("total", "rstd")
        return result if down is None else down

    def _drop_x(self, context: ForwardContext, activations: MlpActivations) -> None:
        """Keeps what backward() reads if it does not recompute: LoRA's input, without fp8."""
        values = activations.x.values if self.gate_up.has_lora and not context.recomputes_mlp else None
        activations.x = Rows(values)

    def backward(
        self, grad: Tensor, context: ForwardContext, activations: MlpActivations, format: Format
    ) -> tuple[Rows, list[Tensor]]:
        """(gradient of total in a format, gradients of the LoRA matrices). grad: of total plus the MLP's summand."""
        parts = _tiles(len(grad), context)
        is_tiled = len(parts) > 1
        d_x = torch.empty_like(grad) if is_tiled else None
        gate_up_weights, down_weights = self._weights(is_tiled, context)
        gradients: list[Tensor] = []
        for tokens, tile in zip(parts, activations.tiles, strict=True):
            x = activations.x.part(tokens)
            if not hasattr(tile, "gate_up"):
                self._gate(x, context, gate_up_weights, tile)
            d_gate_up, d_down = self._down_backward(grad[tokens], tokens.start, context, down_weights, tile)
            out = None if d_x is None else d_x[tokens]
            d_part, d_lora = self.gate_up.backward(
                d_gate_up, x.values, tile.gate_up_low_rank, context, weights=gate_up_weights, out=out
            )
            del d_gate_up
            tile.drop("gate_up_low_rank")
            gradients = [*map(Tensor.add_, gradients, d_lora + d_down)] if gradients else d_lora + d_down
        d_x = d_part if d_x is None else d_x
        assert d_x is not None
        d_total = rmsnorm_backward_(d_x, activations.total, activations.rstd, self.norm.weight, grad, format)
        return d_total, gradients

    def _down_backward(
        self, grad: Tensor, first_token: int, context: ForwardContext, weights: Weights | None, tile: Tile
    ) -> tuple[Rows, list[Tensor]]:
        """(gradient of gate and up, gradients of down's LoRA matrices) for one tile."""
        down = self.down
        activated = None
        if not hasattr(tile, "down_low_rank"):
            rows = self._activate(tile, first_token, VALUES)
            activated, tile.down_low_rank = rows.values, down.low_rank(rows, context)
        rows = as_rows(grad, down.grad_format(context))
        grad_low_rank = down.grad_low_rank(rows, tile.down_low_rank)
        d_activated = down.input_gradient(rows, tile.down_low_rank, grad_low_rank, weights or down.weights(context))
        d_gate_up = swiglu_backward_(
            d_activated, tile.gate_up, self.gate_up.grad_format(context), result=down.has_lora and activated is None
        )
        if activated is None:
            activated = d_activated  # overwritten by the result
        gradients = down.matrix_gradients(rows, activated, tile.down_low_rank, grad_low_rank)
        tile.drop("gate_up", "down_low_rank")
        return d_gate_up, gradients

    def _weights(self, is_tiled: bool, context: ForwardContext) -> tuple[Weights | None, Weights | None]:
        """Of gate and up, and of down: shared by all tiles. None: each product makes its own and frees them."""
        return (self.gate_up.weights(context), self.down.weights(context)) if is_tiled else (None, None)

    def _gate(self, x: Rows, context: ForwardContext, weights: Weights | None, tile: Tile) -> None:
        tile.gate_up, tile.gate_up_low_rank = self.gate_up.forward(x, context, weights)

    def _activate(self, tile: Tile, first_token: int, format: Format) -> Rows:
        """The input of down."""
        return swiglu(tile.gate_up, format)._replace(first_token=first_token)


def _tiles(num_tokens: int, context: ForwardContext) -> list[slice]:
    size = num_tokens
    if context.recomputes_mlp:
        size = min(max(-(-num_tokens // TILES), MIN_TOKENS), MAX_TOKENS)
    return [slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size)]
