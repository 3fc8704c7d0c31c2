"""Fixtures for all tests: PDFs of each kind, params.yaml with changes, Python in another process."""

import ctypes
import gc
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from dask_processes import start_scheduler
from helpers import REPOSITORY, prose
from ruamel.yaml import YAML
from tiny_pdfs import flate_bomb, hanging_pdf, raw_pdf, text_stream, write_pdf, write_scan


def has_cuda_driver() -> bool:
    """True if a CUDA driver is installed. The machine may still have no usable GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# Imports make a million objects that live until the end. The garbage collector must not search them again and again.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# As runtime/startup.py does for the stages, before torch is imported: bitsandbytes would import torch's compiler.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs without `-m gpu`: the other tests compare results of a CPU, and interpret the kernels.

    CUDA and Triton read these variables when they are imported.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"


# These files start first, so that the processes of `make test` end at the same time.
SLOW_FILES = (
    "test_torture", "test_launcher", "test_kernels_compiled", "test_cluster", "test_job", "test_loop",
    "test_kernels_fused", "test_families", "test_map_on_cluster", "test_new_process", "test_extraction",
    "test_find_batch", "test_probe", "test_layer_stream", "test_probe_processes", "test_faults", "test_initialization",
    "test_tracking",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the files. Skips the tests with the marker gpu without `-m gpu`, and on a machine without a GPU."""
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.get_closest_marker("gpu") and (config.option.markexpr != "gpu" or not has_cuda_driver()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and -m gpu"))


@pytest.fixture(scope="session")
def pdfs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One PDF of each kind, by name."""
    folder = tmp_path_factory.mktemp("pdfs")
    whole = write_pdf(folder / "plain.pdf", [prose(1), prose(2), prose(3)])
    from_bytes = {
        "hanging": hanging_pdf(prose(4), prose(5)),
        "bomb": flate_bomb(),
        "one_bad_page": raw_pdf(text_stream(prose(6)), b"BT (never closed <<", text_stream(prose(7))),
        "truncated": whole.read_bytes()[: whole.stat().st_size // 2],
        "no_pdf": b"The climate is warming. " * 40,
        "empty": b"",
    }
    for name, content in from_bytes.items():
        (folder / f"{name}.pdf").write_bytes(content)
    return {
        "plain": whole,
        "password": write_pdf(folder / "password.pdf", [prose(8)], password="secret"),
        "blank_password": write_pdf(folder / "blank_password.pdf", [prose(9)], password=""),
        "scan": write_scan(folder / "scan.pdf"),
        "short": write_pdf(folder / "short.pdf", ["Sea level"]),
        **{name: folder / f"{name}.pdf" for name in from_bytes},
    }


@pytest.fixture(scope="session")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a Dask scheduler without workers."""
    with start_scheduler(tmp_path_factory.mktemp("dask")) as (file, _):
        yield file


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a base model. Most tests use it, and none changes it."""
    from tiny_llama import write_tiny_llama  # imports torch, which other tests do not need

    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama and an adapter, as models/ after train."""
    from tiny_adapter import write_tiny_models

    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """extract starts no processes except the one that runs the engines, as on a machine with one core."""
    monkeypatch.setattr("pdf2lora.documents.extraction.num_cores", lambda: 1)


@cache
def params_of_the_demo() -> dict[str, Any]:
    """The content of params.yaml; hundreds of tests write it with changes."""
    return dict(YAML(typ="safe").load(REPOSITORY / "params.yaml"))


@pytest.fixture
def write_params(tmp_path: Path) -> Callable[..., Path]:
    """Writes params.yaml with changes to tmp_path: write_params({"lora.r": 16}, without=["train.seed"])."""

    def write(changes: dict[str, Any] | None = None, without: list[str] | None = None) -> Path:
        file = tmp_path / "params.yaml"
        file.write_text(changed_params(changes or {}, without or []))
        return file

    return write


def changed_params(changes: dict[str, Any], without: Iterable[str] = ()) -> str:
    """The content of params.yaml with changes."""
    values = deepcopy(params_of_the_demo())
    for key, value in changes.items():
        section, name = _section_of(values, key)
        section[name] = value
    for key in without:
        section, name = _section_of(values, key)
        del section[name]
    return "".join(f"{name}:{_yaml(value)}\n" for name, value in values.items())


def _yaml(value: Any, indent: str = "\n  ") -> str:
    """The value of a key as YAML. JSON is YAML, and ruamel.yaml takes much longer to write it."""
    if isinstance(value, dict) and value and indent:
        return "".join(f"{indent}{key}:{_yaml(setting, '')}" for key, setting in value.items())
    is_json = not isinstance(value, float) or math.isfinite(value)
    return f" {json.dumps(value)}" if is_json else f" .{value}"


def _section_of(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    return values, name


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU of this compute capability, with or without the packages that have code for GPUs."""

    def pretend(capability: tuple[int, int] = (9, 0), *, has_packages: bool = True) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: capability >= (8, 0))
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_packages else None)

    return pretend


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The empty folder into which a test converts."""
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


@pytest.fixture
def start_python() -> Any:
    """Starts Python with code that can import pdf2lora. The process is killed when the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The messages that the code logs, from level INFO. pytest's own fixture is off: see pyproject.toml."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield messages
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a stage configure logging as in its own process, where pytest has no handlers. Restores it afterwards."""
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(logging, "basicConfig", partial(logging.basicConfig, force=True))
    yield
    logging.captureWarnings(False)
    logging.disable(logging.NOTSET)
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
