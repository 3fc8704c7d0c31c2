import pytest
import torch
from tiny_llama import COMPUTE, changed

from pdf2lora.errors import InputError
from pdf2lora.model.device import compute_dtype, limit_gpu_memory


def test_memory_limit_is_a_share_of_the_gpu_and_at_most_all_of_it(monkeypatch):
    shares: list[float] = []
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


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_compute_dtype_without_a_gpu(monkeypatch, setting, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert compute_dtype(changed(COMPUTE, compute_dtype=setting)) == dtype


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A GPU that computes bfloat16, or one that only emulates it."""

    def pretend(*, has_bfloat16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bfloat16
        )

    return pretend


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_never_emulates_bfloat16(pretend_gpu, has_bfloat16):
    pretend_gpu(has_bfloat16=has_bfloat16)

    assert compute_dtype(changed(COMPUTE, compute_dtype="auto")) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    assert compute_dtype(changed(COMPUTE, compute_dtype="float16")) == torch.float16


def test_data_types_that_the_machine_does_not_compute_are_refused(monkeypatch, pretend_gpu):
    pretend_gpu(has_bfloat16=False)
    with pytest.raises(InputError, match="'bfloat16', which this GPU only emulates"):
        compute_dtype(changed(COMPUTE, compute_dtype="bfloat16"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'float16', which needs a CUDA GPU"):
        compute_dtype(changed(COMPUTE, compute_dtype="float16"))
