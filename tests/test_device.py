import pytest
import torch
from tiny_llama import COMPUTE, changed

from pdf2lora.model.device import compute_dtype, limit_gpu_memory


def test_memory_limit_is_a_share_of_the_gpu_and_at_most_all_of_it(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    limit_gpu_memory(20)
    limit_gpu_memory(81)

    assert shares == [0.25, 1.0]


def test_memory_limit_without_a_gpu_does_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: pytest.fail("no GPU to limit"))

    limit_gpu_memory(20)


@pytest.mark.parametrize(("setting", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_compute_dtype_without_a_gpu(monkeypatch, setting, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert compute_dtype(changed(COMPUTE, compute_dtype=setting)) == dtype
