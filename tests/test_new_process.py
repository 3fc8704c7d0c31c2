"""What stages do in a new process: imports, products of MKL, calls of the network, secrets of the environment."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import changed_params
from helpers import REPOSITORY, prose
from tiny_llama import TINY_SETTINGS, write_tiny_llama
from tiny_pdfs import write_pdf

SETTINGS = {
    **TINY_SETTINGS,
    "corpus": "reports",
    "extract.min_characters": 50,
    "evaluate.stride": 16,
    "sample.max_new_tokens": 4,
}
SECRET = "s3cr3t-0f-th3-t3st"
SECRETS = {name: SECRET for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}

# Python imports sitecustomize in every process, so this also watches worker processes.
WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
            return  # a Unix socket, which is local
        with open(os.environ["EVENTS"], "a") as file:
            file.write(f"{event} {arguments[1:]}\\n")

sys.addaudithook(watch)
open(os.path.dirname(os.environ["EVENTS"]) + "/pids", "a").write(f"{os.getpid()}\\n")
"""

# One process for all checks, because the imports take seconds. What convert imports, then what train and find_batch
# import. Then a product with the shape of a LoRA gradient of the demo: by default MKL splits its sum among threads.
# Then the stages.
CODE = """
import sys
import stages, pdf2lora.weights.conversion
print(*sys.modules)
import pdf2lora.training.job, pdf2lora.training.probe
print(*sys.modules)
import torch
torch.manual_seed(0)
a, b = torch.randn(256, 2048), torch.randn(8, 2048)
for num_threads in (2, 1):
    torch.set_num_threads(num_threads)
    print(torch.get_num_threads(), hash(torch.nn.functional.linear(a, b).numpy().tobytes()))
import runpy
for stage in ("extract", "split", "tokenize", "train", "evaluate"):
    runpy.run_module(f"stages.{stage}", run_name="__main__")
"""
SET_BY_PREPARE_PROCESS = ("MKL_CBWR", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS")
UNUSED = {"torch._inductor.compile_fx", "datasketch", "dvc", "dvclive", "matplotlib", "pandas", "sklearn"}
Ended = subprocess.CompletedProcess[str]


def run_watched(folder: Path, code: str) -> Ended:
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch/sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(folder / "watch"), str(REPOSITORY)])
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SET_BY_PREPARE_PROCESS and not name.startswith("DVC_")
    }
    environment = kept | SECRETS | {"PYTHONPATH": path, "EVENTS": str(folder / "events")}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "params.yaml").write_text(changed_params(SETTINGS))
    for number in range(4):
        write_pdf(folder / f"data/pdfs/reports/{number}.pdf", [prose(number)])
    write_tiny_llama(folder / "models/base")
    (folder / "data/general").mkdir()
    (folder / "data/general/text.txt").write_text(prose(5))
    (folder / "metrics").mkdir()
    (folder / "metrics/batch.json").write_text(
        '{"device": "cpu", "memory_gib": "auto", "placement": "gpu", "gradient_checkpointing": "full", '
        '"per_device_batch": 2, "gradient_accumulation_steps": 1, "effective_batch": 2}'
    )
    return folder


@pytest.fixture(scope="module")
def ended(project: Path) -> Ended:
    ended = run_watched(project, CODE)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.mark.timeout(300)  # the process imports torch and transformers
def test_convert_does_not_import_transformers(ended: Ended) -> None:
    names = set(ended.stdout.splitlines()[0].split())

    assert "pdf2lora.weights.conversion" in names
    assert not names & {"transformers", "sentencepiece"}


def test_training_imports_no_package_that_it_does_not_use(ended: Ended) -> None:
    names = set(ended.stdout.splitlines()[1].split())

    assert {"torch", "transformers", "peft", "bitsandbytes", "pdf2lora.training.loop"} <= names
    assert not names & UNUSED


def test_irrelevant_bitsandbytes_warning_is_suppressed(ended: Ended) -> None:
    assert "gemm_4bit_forward" not in ended.stderr


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_product_does_not_depend_on_the_number_of_threads(ended: Ended) -> None:
    threads, hashes = zip(*(line.split() for line in ended.stdout.splitlines()[2:4]), strict=True)

    assert threads == ("2", "1")
    assert len(set(hashes)) == 1


def test_no_stage_uses_the_network_or_writes_a_secret(project: Path, ended: Ended) -> None:
    assert not (project / "events").exists(), (project / "events").read_text()
    assert len(set((project / "pids").read_text().split())) > 1  # the stages and their workers
    written = [path for path in project.rglob("*") if path.is_file()]
    assert {"eval.json", "adapter_model.safetensors"} <= {path.name for path in written}
    assert any("training_" in path.name for path in written)
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "import socket; socket.getaddrinfo('example.invalid', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9', timeout=1)",
    ],
)
def test_the_watch_sees_network_calls(tmp_path: Path, code: str) -> None:
    assert run_watched(tmp_path, code).returncode != 0
    assert "socket." in (tmp_path / "events").read_text()


def test_dvc_sends_no_statistics() -> None:
    assert "analytics = false" in (REPOSITORY / ".dvc/config").read_text()


def test_libraries_do_not_contact_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import stages, huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE)"
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n"
