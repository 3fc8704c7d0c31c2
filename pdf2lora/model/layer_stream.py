"""Decoder layers in host memory. Two buffers on the GPU hold the current layer and the next one.

While layer n computes, the next layer is copied: layer n + 1 in the forward pass, layer n - 1 in the backward pass. A
layer is copied twice per micro-batch. The copy costs no time if it is shorter than the computation of a layer: on a
PCIe 5 link (about 50 GB/s) this needs about 4,000 tokens per micro-batch. The gradients are the same, bit for bit, as
with all layers in GPU memory. The frozen weights never change, so nothing is copied back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdf2lora.model.head import causal_lm_of
from pdf2lora.model.packed_layers import LayerLayout

NUM_BUFFERS = 2


class LayerStream:
    """Call restart() before each forward pass, and load() before each use of a layer's weights."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        layouts: Sequence[LayerLayout],
        host: Sequence[Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ):
        """host: the buffer of each layer, in pinned memory if `device` is a GPU."""
        self.layers, self.layouts, self.host = layers, layouts, host
        num_bytes = max(layout.num_bytes for layout in layouts)
        self.buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self.views = [[layout.views(buffer) for buffer in self.buffers] for layout in layouts]
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None
        # The number of the layer in each buffer. Its copy may still run.
        self.buffered: list[int | None] = [None] * NUM_BUFFERS
        self.last = 0
        for number, layer in enumerate(layers):
            layouts[number].attach(layer, self.views[number][0], dtype)
            self._add_hooks(number, layer)

    def restart(self) -> None:
        """Marks both buffers as empty, because the replay of a CUDA graph may have changed them."""
        self.buffered = [None] * NUM_BUFFERS

    def load(self, number: int, *, backward: bool = False) -> None:
        """Makes layer `number` usable on the current CUDA stream, and starts to copy the next layer.

        backward: the order of the layers is from the last to the first.
        """
        if number not in self.buffered:
            self._fetch(number, 0)
        slot = self.buffered.index(number)
        self.join()
        self.layouts[number].bind(self.layers[number], self.views[number][slot])
        following = number - 1 if backward else number + 1
        if 0 <= following < len(self.layers) and following not in self.buffered:
            self._fetch(following, 1 - slot)
        self.last = number

    def join(self) -> None:
        """Makes the current CUDA stream wait for the copies. The capture of a graph must end with this call."""
        if self.copies is not None:
            torch.cuda.current_stream().wait_stream(self.copies)

    def _fetch(self, number: int, slot: int) -> None:
        """Copies a layer to a buffer, as soon as no kernel reads the buffer's earlier content."""
        self.buffered[slot] = number
        host = self.host[number]
        buffer = self.buffers[slot][: host.numel()]
        if self.copies is None:
            buffer.copy_(host)
            return
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            buffer.copy_(host, non_blocking=True)

    def _add_hooks(self, number: int, layer: nn.Module) -> None:
        """Loads the weights of transformers' layers. Activation checkpointing calls them again in the backward pass."""

        def before_forward(module: nn.Module, args: Any) -> None:
            is_recomputed = torch.is_grad_enabled() and number <= self.last and number in self.buffered
            if number == 0 and not is_recomputed:
                self.restart()
            self.load(number, backward=is_recomputed)

        def before_backward(module: nn.Module, grads: Any) -> None:
            self.load(number, backward=True)

        layer.register_forward_pre_hook(before_forward)
        layer.register_full_backward_pre_hook(before_backward)


def layer_stream(model: Any) -> LayerStream | None:
    """The stream of a base model or a PeftModel; None if its layers are in GPU memory."""
    stream: LayerStream | None = getattr(causal_lm_of(model), "layer_stream", None)
    return stream
