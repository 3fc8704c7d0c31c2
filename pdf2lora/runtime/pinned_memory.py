"""Pinned host memory that the processes of a node share: a GPU copies from it while it computes."""

import mmap
import os
import socket
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.free_space import available_bytes

GIB = 2**30
PORTABLE = 1  # cudaHostRegisterPortable
RESERVE_GIB = 2.0  # of host memory, for the libraries of a process


def require_host_memory(num_bytes: int, purpose: str) -> None:
    """Raises InputError if this machine has less memory available than `num_bytes` bytes and RESERVE_GIB."""
    available = available_bytes()
    if num_bytes + RESERVE_GIB * GIB > available:
        raise InputError(
            f"{purpose} needs {num_bytes / GIB:.1f} GiB of host memory and {RESERVE_GIB:.0f} GiB for the libraries; "
            f"{available / GIB:.1f} GiB are available. Free some (free -h shows it), or use a smaller base model."
        )


def shared_pinned_memory(num_bytes: int, fill: Callable[[Tensor], None], processes: Processes, purpose: str) -> Tensor:
    """Returns shared memory, (num_bytes,), uint8. The first process of each node allocates and fills it; all map it.

    purpose: of the memory, for error messages.

    Raises InputError if the host has too little memory, or the driver does not pin it.
    """
    descriptor = -1
    if processes.is_first_of_node:
        require_host_memory(num_bytes, purpose)
        descriptor = os.memfd_create("pdf2lora")  # in memory, without a limit such as that of /dev/shm
        os.truncate(descriptor, num_bytes)
        fill(torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8))
    node = socket.gethostname()
    owners = processes.gather((node, os.getpid(), descriptor))
    if not processes.is_first_of_node:
        _, pid, number = next(owner for owner in owners if owner[0] == node and owner[2] >= 0)
        descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    memory = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
    processes.gather(None)  # all have opened it
    os.close(descriptor)
    if torch.cuda.is_available():
        _pin(memory, purpose)
    return memory


def _pin(memory: Tensor, purpose: str) -> None:
    address, runtime = memory.data_ptr(), torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(address, memory.numel(), PORTABLE)
    if int(status) != 0:
        raise InputError(
            f"{purpose} needs {memory.numel() / GIB:.1f} GiB of pinned host memory, which the CUDA driver refuses "
            f"({status}). Free host memory, or raise the limit of locked memory (ulimit -l)."
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, address)
