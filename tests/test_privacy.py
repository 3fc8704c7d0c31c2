"""No stage uses the network, and no secret of the environment is written to a file or printed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, prose, write_pdf
from tiny_llama import COMPUTE, LORA, QUANTIZATION, TRAIN, write_tiny_llama

SETTINGS = {
    **{f"train.{key}": value for key, value in TRAIN.model_dump().items()},
    **{f"compute.{key}": value for key, value in COMPUTE.model_dump().items()},
    **{f"lora.{key}": value for key, value in LORA.model_dump().items()},
    **{f"quantization.{key}": value for key, value in QUANTIZATION.model_dump().items()},
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

# One process for all stages: the imports of torch take most of the time.
STAGES = """
import runpy
for stage in ("extract", "split", "tokenize", "train", "evaluate"):
    runpy.run_module(f"stages.{stage}", run_name="__main__")
"""


def run_watched(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch/sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(folder / "watch"), str(REPOSITORY)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    environment = kept | SECRETS | {"PYTHONPATH": path, "EVENTS": str(folder / "events")}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.timeout(300)  # another process imports torch
def test_no_stage_uses_the_network_or_writes_a_secret(
    tmp_path: Path, base: Path, write_params: Callable[..., Path]
) -> None:
    write_params(SETTINGS)
    for number in range(4):
        write_pdf(tmp_path / f"data/pdfs/reports/{number}.pdf", [prose(number)])
    shutil.copytree(base, tmp_path / "models/base")
    (tmp_path / "data/general").mkdir()
    (tmp_path / "data/general/text.txt").write_text(prose(5))
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/batch.json").write_text(
        '{"device": "cpu", "memory_gib": "auto", "placement": "gpu", "gradient_checkpointing": "full", '
        '"per_device_batch": 2, "gradient_accumulation_steps": 1, "effective_batch": 2}'
    )

    ended = run_watched(tmp_path, STAGES)

    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "events").exists(), (tmp_path / "events").read_text()
    assert len(set((tmp_path / "pids").read_text().split())) > 1  # the stages and their workers
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
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
