"""Hostile source models: they run code, exhaust memory or name files elsewhere."""

import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_tiny_llama

from pdf2lora.errors import InputError
from pdf2lora.weights.conversion import convert
from tests.long.fuzz import SOURCE_MODEL, fuzz_models


class RunsCode:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE_MODEL, tmp_path / "meta"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def hugging_face(tmp_path: Path, tiny: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "hugging_face"))


def refusal(source: Path) -> str:
    """Returns the error message of convert. Checks that it wrote nothing and used little memory."""
    target = source.with_name("base")
    target.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        convert(source, target, llama_version="3.2", max_shard_gib=2.0)
    assert list(target.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
    return str(refused.value)


def save_zip(weights: object, file: Path) -> None:
    torch.save(weights, file)


def save_legacy(weights: object, file: Path) -> None:
    torch.save(weights, file, _use_new_zipfile_serialization=False)


def save_pickle(weights: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(weights))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_a_pickle_runs_no_code(meta: Path, tmp_path: Path, save: Callable[[object, Path], None]) -> None:
    proof = tmp_path / "code-ran"
    save({"tok_embeddings.weight": RunsCode(proof)}, meta / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError):
        proof.stat()

    message = refusal(meta)

    assert not proof.exists()
    assert "it contains code" in message or "this is not a torch file" in message


def test_the_payload_runs_if_pickle_is_trusted(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "code-ran")))
    assert (tmp_path / "code-ran").is_dir()


def test_a_record_that_inflates_to_hundreds_of_megabytes_is_not_inflated(meta: Path) -> None:
    file = meta / "consolidated.00.pth"
    with (
        zipfile.ZipFile(file) as whole,
        zipfile.ZipFile(meta / "bomb", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for record in whole.namelist():
            with bomb.open(record, "w") as out:
                for _ in range(256 if record.endswith("data.pkl") else 0):
                    out.write(bytes(2**20))
    (meta / "bomb").replace(file)
    assert file.stat().st_size < 2 * 2**20

    assert refusal(meta).endswith(
        "this is not a torch file, or it is truncated (RuntimeError). Download the file again."
    )


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("[" * 200_000, "params.json: this is not valid JSON"),
        ('{"a":' * 200_000, "params.json: this is not valid JSON"),
        ('{"dim": 1' + "0" * 10_000 + "}", "params.json: this is not valid JSON"),
        (
            '{"dim": 1099511627776, "n_heads": 8, "use_scaled_rope": true}',
            "dim is 1099511627776; it must be a whole number",
        ),
        ('{"dim": -8, "n_heads": 8, "use_scaled_rope": true}', "dim is -8; it must be a whole number"),
    ],
    ids=["deep list", "deep object", "digits", "huge", "negative"],
)
def test_params_out_of_range_are_refused(meta: Path, params: str, words: str) -> None:
    (meta / "params.json").write_text(params)
    assert words in refusal(meta)


def test_mutated_source_models(tmp_path: Path) -> None:
    assert fuzz_models(tmp_path / "models", 25, seed=7).startswith("fuzz: 25 source models")


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "sub/model.safetensors", "a\0b", "..", ".", ""], ids=repr
)
def test_an_index_cannot_name_a_file_elsewhere(hugging_face: Path, name: str) -> None:
    for outside in (hugging_face.parent.parent / "secret", hugging_face / "sub"):
        outside.mkdir(exist_ok=True)
    shutil.copy(hugging_face / "model.safetensors", hugging_face / "sub")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (hugging_face / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "the file is not in the folder, but model.safetensors.index.json names it" in refusal(hugging_face)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776; it must be a whole number from 1 to 1048576"),
        ({"hidden_size": 2**20}, "lm_head.weight must have shape (260, 1048576)"),
        ({"intermediate_size": 2**20}, "mlp.down_proj.weight must have shape (64, 1048576)"),
        ({"num_attention_heads": 2**19}, "not a multiple of the number of attention heads (524288)"),
        (
            {"num_key_value_heads": 4},
            "self_attn.k_proj.weight must have shape (64, 64), but it has (32",
        ),
        ({"hidden_size": "64"}, 'hidden_size is "64"; it must be a whole number'),
        ({"rope_parameters": "x"}, 'rope_parameters is "x"; it must be an object'),
    ],
)
def test_sizes_that_contradict_the_weights_are_refused(hugging_face: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((hugging_face / "config.json").read_text())
    (hugging_face / "config.json").write_text(json.dumps(config | changes))

    assert words in refusal(hugging_face)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**62),
        (b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}', None),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}', None),
    ],
    ids=["header", "shape", "offsets"],
)
def test_safetensors_with_impossible_sizes_are_refused(hugging_face: Path, header: bytes, length: int | None) -> None:
    content = struct.pack("<Q", length or len(header)) + header + b"abcd"
    (hugging_face / "model.safetensors").write_bytes(content)

    assert "this is not a safetensors file, or it is truncated" in refusal(hugging_face)


def test_weights_in_pickles_are_not_read(hugging_face: Path, tmp_path: Path) -> None:
    (hugging_face / "model.safetensors").unlink()
    save_zip({"model.embed_tokens.weight": RunsCode(tmp_path / "code-ran")}, hugging_face / "pytorch_model.bin")

    assert "the weights are only in pickled *.bin files, which can run code when they are read" in refusal(hugging_face)
    assert not (tmp_path / "code-ran").exists()
