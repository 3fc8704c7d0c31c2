"""Memory of the host that this process may still use."""

from pathlib import Path

import psutil

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
