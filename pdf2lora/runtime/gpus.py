"""Lists and locks the GPUs of this machine without torch.

torch takes seconds to import, and CUDA reads CUDA_VISIBLE_DEVICES only once, when it starts.
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from pdf2lora.runtime.locks import try_lock

LOCKS = Path(tempfile.gettempdir()) / f"pdf2lora-gpus-{os.getuid()}"
UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as UUIDs or other names that CUDA_VISIBLE_DEVICES accepts.

    Empty without a driver. An index in CUDA_VISIBLE_DEVICES is a position in PCI bus order.
    """
    uuids = _uuids()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None or not uuids:
        return uuids
    gpus = []
    for name in filter(None, map(str.strip, allowed.split(","))):
        if name.lstrip("-").isdigit():
            if not 0 <= int(name) < len(uuids):
                break  # CUDA ignores the rest too
            gpus.append(uuids[int(name)])
        else:
            gpus.append(next((uuid for uuid in uuids if uuid.startswith(name)), name))
    return list(dict.fromkeys(gpus))  # each GPU has one lock


def _uuids() -> list[str]:
    """UUIDs of all GPUs in PCI bus order, from NVML, which is part of the driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    uuids = []
    for index in range(count.value):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(UUID_BYTES)
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
            nvml.nvmlDeviceGetUUID(handle, name, UUID_BYTES)
            uuids.append(name.value.decode())
    nvml.nvmlShutdown()
    return uuids


@contextmanager
def reserve_gpus(gpus: Sequence[str], count: int) -> Iterator[tuple[list[str], list[int]]]:
    """Locks `count` of the GPUs. Waits while too few are free.

    Yields the names of the GPUs and the file descriptors of their locks. The kernel releases a lock when all processes
    that inherited its descriptor have ended, also after kill -9.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    is_first_try = True
    while True:
        with ExitStack() as stack:
            reserved: list[tuple[str, IO[str]]] = []
            for gpu in gpus:
                lock = stack.enter_context((LOCKS / f"{gpu}.lock").open("a+"))
                if len(reserved) < count and try_lock(lock):
                    reserved.append((gpu, lock))
            if len(reserved) == count:
                yield [gpu for gpu, _ in reserved], [lock.fileno() for _, lock in reserved]
                return
        if is_first_try:
            print(f"waiting for free GPUs ({count} needed): other runs hold the locks in {LOCKS}", flush=True)
            is_first_try = False
        time.sleep(0.5)
