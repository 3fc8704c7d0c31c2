import psutil
import pytest

from pdf2lora.runtime import free_space
from pdf2lora.runtime.free_space import available_bytes


@pytest.mark.parametrize(
    ("limit", "expected"), [("5000", 5000 - 3000 + 1000), ("max", None), ("99999999999999999", None)]
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, limit, expected):
    """The memory of cached files counts as available."""
    monkeypatch.setattr(free_space, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\nfile 1000\n")

    assert available_bytes() == (expected or 10**6)


def test_without_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(free_space, "CGROUP", tmp_path)

    assert available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
