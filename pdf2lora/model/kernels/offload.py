"""Keeps layer inputs in host memory between the passes. Copies overlap with computation (Rajbhandari et al. 2021)."""

import torch
from torch import Tensor


class Offload:
    """One tensor per layer: put() in the forward pass, take() in reverse order in the backward pass."""

    def __init__(self) -> None:
        self.copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.host: dict[int, Tensor] = {}  # pinned, kept between steps
        self.moving: dict[int, Tensor] = {}  # on the GPU, during a copy

    def put(self, number: int, tensor: Tensor) -> None:
        """Starts to copy the tensor of layer `number`. Frees the GPU memory of the previous layer's tensor."""
        assert self.copies is not None
        if number not in self.host or self.host[number].shape != tensor.shape:
            self.host[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._finish()
        self.moving = {number: tensor}
        with torch.cuda.stream(self.copies):
            self.host[number].copy_(tensor, non_blocking=True)

    def take(self, number: int) -> Tensor:
        """The tensor of layer `number`. Starts to copy the previous layer's tensor."""
        if number not in self.moving:
            self._fetch(number)
        self._finish()
        tensor = self.moving.pop(number)
        self.moving.clear()
        if number > 0:
            self._fetch(number - 1)
        return tensor

    def _fetch(self, number: int) -> None:
        self.moving[number] = torch.empty_like(self.host[number], device="cuda")
        assert self.copies is not None
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            self.moving[number].copy_(self.host[number], non_blocking=True)

    def _finish(self) -> None:
        """Both streams wait for each other: later kernels may reuse memory that a copy has read, and vice versa."""
        assert self.copies is not None
        torch.cuda.current_stream().wait_stream(self.copies)
        self.copies.wait_stream(torch.cuda.current_stream())
