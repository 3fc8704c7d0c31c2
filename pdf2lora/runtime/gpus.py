"""GPUs without torch: which ones this process may use, and an exclusive lock on each.

torch would answer the same questions, but takes seconds to import, and CUDA reads CUDA_VISIBLE_DEVICES only once.
"""

import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

LOCKS = Path(tempfile.gettempdir()) / f"pdf2lora-gpus-{os.getuid()}"
UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE


def has_cuda_driver() -> bool:
    """Whether the machine can have a usable GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by names that CUDA_VISIBLE_DEVICES accepts; none without a driver.

    An index in CUDA_VISIBLE_DEVICES counts in the order of the PCI bus.
    """
    uuids = _uuids()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None or not uuids:
        return uuids
    gpus = []
    for name in filter(None, map(str.strip, allowed.split(","))):
        if name.lstrip("-").isdigit():
            if not 0 <= int(name) < len(uuids):
                break  # CUDA ignores the rest, too
            gpus.append(uuids[int(name)])
        else:
            gpus.append(next((uuid for uuid in uuids if uuid.startswith(name)), name))
    return gpus


def _uuids() -> list[str]:
    """UUIDs of all GPUs in the order of the PCI bus, from NVML, which comes with the driver."""
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
    """Locks `count` of the GPUs; waits while too few are free.

    Yields the names and the file descriptors of the locks. A lock holds until each process that inherited the
    descriptor has ended, however it ends.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    waiting = False
    while True:
        with ExitStack() as stack:
            reserved: list[tuple[str, IO[str]]] = []
            for gpu in gpus:
                lock = stack.enter_context((LOCKS / f"{gpu}.lock").open("a+"))
                if len(reserved) < count and _try_lock(lock):
                    reserved.append((gpu, lock))
            if len(reserved) == count:
                yield [gpu for gpu, _ in reserved], [lock.fileno() for _, lock in reserved]
                return
        if not waiting:
            print(
                f"waits for {count} free GPU{'s' if count > 1 else ''}: other runs hold the locks in {LOCKS}",
                flush=True,
            )
            waiting = True
        time.sleep(0.5)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
