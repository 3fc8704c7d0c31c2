"""The processes that compute one job together, through accelerate: number, devices and collectives."""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

from pdf2lora.runtime.launcher import PeerLost

# Of a collective. The main process can hash a large base while the others wait in one. The launcher notices within a
# minute if a process ends or hangs.
TIMEOUT = timedelta(minutes=30)


class Processes:
    """All processes of the job. With one process, each collective returns its argument."""

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        group: dict[str, Any] = {"backend": "nccl" if on_gpu else "gloo", "timeout": TIMEOUT}
        self.state = PartialState(cpu=not on_gpu, **group if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {})
        self.index: int = self.state.process_index
        self.count: int = self.state.num_processes
        self.device: torch.device = self.state.device
        self.is_first_of_node: bool = self.state.local_process_index == 0

    @classmethod
    def alone(cls, device: torch.device) -> "Processes":
        """A job of this process only, even inside a job of several: no collective waits for another process."""
        alone = cls.__new__(cls)
        alone.index, alone.count, alone.device, alone.is_first_of_node = 0, 1, device, True
        return alone

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def leave_output_to_main(self) -> None:
        """Turns off log lines and warnings in all processes but the main one, which prints the same."""
        if not self.is_main:
            logging.disable()
            warnings.simplefilter("ignore")

    def sum_(self, tensor: Tensor) -> None:
        """Replaces `tensor` in each process by its sum over the processes."""
        if self.count > 1:
            with _peer_errors():
                tensor.copy_(reduce(tensor, reduction="sum"))

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all processes, in their order, in each process."""
        if self.count == 1:
            return [value]
        with _peer_errors():
            return list(gather_object([value]))

    def broadcast(self, value: Any) -> Any:
        """The picklable value of the main process, in each process."""
        if self.count == 1:
            return value
        with _peer_errors():
            return broadcast_object_list([value])[0]

    def require_equal(self, tensor: Tensor, name: str) -> None:
        """Checks that a tensor has the same bytes in all processes. Raises RuntimeError if the bytes differ."""
        if self.count == 1:
            return
        digest = hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
        digests = self.gather(digest)
        if len(set(digests)) > 1:
            raise RuntimeError(f"{name} differs between the processes: {', '.join(d[:12] for d in digests)}")

    def end(self) -> None:
        """Leaves the process group."""
        if self.count > 1:
            self.state.destroy_process_group()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raises PeerLost if a collective fails because another process has gone."""
    try:
        yield
    except torch.distributed.DistError as error:
        raise PeerLost(str(error)) from error
    except RuntimeError as error:
        if "gloo" in str(error) or "Connection" in str(error):
            raise PeerLost(str(error)) from error
        raise
