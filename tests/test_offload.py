"""The host memory of offloaded activations; tests/test_gpu.py tests the copies."""

import pytest
import torch

from pdf2lora.model.kernels import offload
from pdf2lora.model.kernels.offload import HostOutOfMemory

GIB = 2**30


@pytest.mark.parametrize(
    ("num_bytes", "available_gib", "fits"), [(GIB, 3.01, True), (GIB, 2.99, False), (GIB + 2, 3.5, False)]
)
def test_memory_is_checked_before_it_is_allocated(monkeypatch, num_bytes, available_gib, fits):
    """2 GiB stay for the libraries. PyTorch takes 2 GiB for a tensor of a little more than 1."""
    monkeypatch.setattr(offload, "available_bytes", lambda: int(available_gib * GIB))
    tensors = [torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="meta")]

    if fits:
        offload._require_host_memory(tensors)
        return
    with pytest.raises(HostOutOfMemory, match=f"{available_gib:.1f} GiB are available"):
        offload._require_host_memory(tensors)
