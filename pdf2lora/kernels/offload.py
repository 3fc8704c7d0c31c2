"""Layer inputs in the host's memory between the passes, copied while the GPU computes (Rajbhandari et al. 2021)."""

import torch
from torch import Tensor


class Offload:
    """One tensor a layer, put in the forward pass and taken in reverse order in the backward pass."""

    def __init__(self) -> None:
        self.copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.host: dict[int, Tensor] = {}  # pinned, kept from step to step
        self.arriving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def put(self, number: int, tensor: Tensor) -> None:
        assert self.copies is not None
        if number not in self.host or self.host[number].shape != tensor.shape:
            self.host[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            self.host[number].copy_(tensor, non_blocking=True)
        tensor.record_stream(self.copies)

    def take(self, number: int) -> Tensor:
        """The tensor of layer `number`; that of the layer before starts on its way."""
        if number not in self.arriving:
            self._fetch(number)
        tensor, arrived = self.arriving.pop(number)
        torch.cuda.current_stream().wait_event(arrived)
        if number > 0:
            self._fetch(number - 1)
        return tensor

    def _fetch(self, number: int) -> None:
        assert self.copies is not None
        tensor = torch.empty_like(self.host[number], device="cuda")
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            tensor.copy_(self.host[number], non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.arriving[number] = tensor, arrived
