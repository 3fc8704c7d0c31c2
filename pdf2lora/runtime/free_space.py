"""Memory and disk space of the host that this process may still use."""

import shutil
from pathlib import Path

import psutil

from pdf2lora.errors import InputError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


def available_bytes() -> int:
    """Available memory of the machine, or of the container if its limit is lower."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        current = int((CGROUP / "memory.current").read_text())
        cached = int(dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["file"])
    except (OSError, ValueError, KeyError):
        return available
    return available if limit == "max" else min(available, int(limit) - current + cached)


def require_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises InputError if the disk of `folder` has fewer than `num_bytes` bytes free."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise InputError(
            f"{folder}: {num_bytes / GIB:.1f} GiB are needed, {free // (GIB // 10) / 10:.1f} GiB are free. "
            "Free some space on that disk."
        )
