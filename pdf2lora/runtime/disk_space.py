"""Free disk space, checked before a large write."""

import shutil
from pathlib import Path

from pdf2lora.errors import InputError

GIB = 2**30


def require_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises InputError if the disk of `folder` has fewer than `num_bytes` bytes free."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise InputError(
            f"{folder}: {num_bytes / GIB:.1f} GiB are needed, {free // (GIB // 10) / 10:.1f} GiB are free. "
            "Free some space on that disk."
        )
