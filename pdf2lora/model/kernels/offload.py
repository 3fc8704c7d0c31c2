"""Keeps activations in host memory between the passes. Copies overlap with computation (Rajbhandari et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdf2lora.runtime.free_space import GIB, available_bytes
from pdf2lora.runtime.pinned_memory import RESERVE_GIB


class HostOutOfMemory(torch.OutOfMemoryError):
    """Too little host memory for activations. find_batch tries a smaller batch, as after too little GPU memory."""


class Offload:
    """Some tensors per layer: put() in the forward pass, take() in reverse order in the backward pass."""

    def __init__(self) -> None:
        self.copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.host: dict[int, list[Tensor]] = {}  # pinned, kept between steps
        self.moving: dict[int, list[Tensor]] = {}  # on the GPU, during a copy

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Starts to copy the tensors of layer `number`. Frees the GPU memory of the previous layer's tensors.

        Raises HostOutOfMemory.
        """
        assert self.copies is not None
        if number not in self.host or not all(map(_have_equal_layout, self.host[number], tensors)):
            _require_host_memory(tensors)
            self.host[number] = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        self._finish()
        self.moving = {number: list(tensors)}
        with torch.cuda.stream(self.copies):
            for copy, tensor in zip(self.host[number], tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)

    def take(self, number: int) -> list[Tensor]:
        """The tensors of layer `number`. Starts to copy the previous layer's tensors."""
        if number not in self.moving:
            self._fetch(number)
        self._finish()
        tensors = self.moving.pop(number)
        self.moving.clear()
        if number > 0:
            self._fetch(number - 1)
        return tensors

    def _fetch(self, number: int) -> None:
        self.moving[number] = [torch.empty_like(copy, device="cuda") for copy in self.host[number]]
        assert self.copies is not None
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            for tensor, copy in zip(self.moving[number], self.host[number], strict=True):
                tensor.copy_(copy, non_blocking=True)

    def _finish(self) -> None:
        """Both streams wait for each other: later kernels may reuse memory that a copy has read, and vice versa."""
        assert self.copies is not None
        torch.cuda.current_stream().wait_stream(self.copies)
        self.copies.wait_stream(torch.cuda.current_stream())


def _require_host_memory(tensors: Sequence[Tensor]) -> None:
    """PyTorch rounds the size of a pinned tensor up to a power of two."""
    needed, available = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors), available_bytes()
    if needed + RESERVE_GIB * GIB > available:
        raise HostOutOfMemory(
            f"offload needs {needed / GIB:.2f} GiB more for one layer, and {available / GIB:.1f} GiB are available"
        )


def _have_equal_layout(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride()
