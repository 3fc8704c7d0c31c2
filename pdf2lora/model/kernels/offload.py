"""Layer inputs in the host's memory between the passes, copied while the GPU computes (Rajbhandari et al. 2021)."""

import torch
from torch import Tensor


class Offload:
    """One tensor a layer, put in the forward pass and taken in reverse order in the backward pass."""

    def __init__(self) -> None:
        self.copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.host: dict[int, Tensor] = {}  # pinned, kept from step to step
        self.moving: dict[int, Tensor] = {}  # on the GPU, while a copy reads or writes them

    def put(self, number: int, tensor: Tensor) -> None:
        """Starts a copy of layer `number`'s tensor; that of the layer before has ended, and its memory is free."""
        assert self.copies is not None
        if number not in self.host or self.host[number].shape != tensor.shape:
            self.host[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._finish()
        self.moving = {number: tensor}
        with torch.cuda.stream(self.copies):
            self.host[number].copy_(tensor, non_blocking=True)

    def take(self, number: int) -> Tensor:
        """The tensor of layer `number`; that of the layer before starts on its way."""
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
        """Both streams wait for each other: kernels to come may use what copies have read, and the other way round."""
        assert self.copies is not None
        torch.cuda.current_stream().wait_stream(self.copies)
        self.copies.wait_stream(torch.cuda.current_stream())
