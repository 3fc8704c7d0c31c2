import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.weights import meta, safetensors_files
from pdf2lora.weights.conversion import convert
from pdf2lora.weights.params_json import LLAMA_VERSIONS

NUM_RANKS = 256 + 8
MERGES = ["th", "the", " t", " the", "an", "and", " a", " and"]
TOKENS = torch.tensor([5, 250, 99, 17, 201, 99, 42])
PLACES = torch.tensor([0, 1, 700, 3000, 9000, 9001, 20000])  # far apart: of positions, attention sees the distances
LATER = torch.ones(len(TOKENS), len(TOKENS)).triu(1).bool()
Weights = dict[str, Tensor]


# A small random checkpoint in Meta's layout


def make_params(version: str, **changes: Any) -> dict[str, Any]:
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "multiple_of": 32}
    if version in ("1", "2"):
        params |= {"vocab_size": -1}
    else:
        params |= {"vocab_size": NUM_RANKS + 256, "rope_theta": 500000.0}
    if version in ("3.1", "3.2"):
        params["use_scaled_rope"] = True
    return params | changes


def make_weights(params: dict[str, Any], vocab_size: int, *, tied: bool, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights large enough that every part of the model shows in the logits."""
    draw = torch.Generator().manual_seed(7)
    dim, head_dim, hidden = params["dim"], params["dim"] // params["n_heads"], 88

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=draw) * gain / math.sqrt(columns)).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.2 * torch.randn(dim, generator=draw)).to(dtype)

    weights = {"tok_embeddings.weight": matrix(vocab_size, dim, gain=3)}
    for n in range(params["n_layers"]):
        kv_dim = (params.get("n_kv_heads") or params["n_heads"]) * head_dim
        weights |= {
            f"layers.{n}.attention.wq.weight": matrix(dim, dim, gain=2),
            f"layers.{n}.attention.wk.weight": matrix(kv_dim, dim, gain=2),
            f"layers.{n}.attention.wv.weight": matrix(kv_dim, dim),
            f"layers.{n}.attention.wo.weight": matrix(dim, dim),
            f"layers.{n}.feed_forward.w1.weight": matrix(hidden, dim),
            f"layers.{n}.feed_forward.w2.weight": matrix(dim, hidden),
            f"layers.{n}.feed_forward.w3.weight": matrix(hidden, dim),
            f"layers.{n}.attention_norm.weight": norm(),
            f"layers.{n}.ffn_norm.weight": norm(),
        }
    weights["norm.weight"] = norm()
    weights["output.weight"] = weights["tok_embeddings.weight"].clone() if tied else matrix(vocab_size, dim)
    return weights


def split_weights(weights: Weights, num_shards: int, embedding_dim: int) -> list[Weights]:
    """Model-parallel shards, as fairscale's layers cut them; `embedding_dim` is the dimension cut in the embedding."""
    shards: list[Weights] = [{} for _ in range(num_shards)]
    for name, weight in weights.items():
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        dim = embedding_dim if name.startswith("tok_embeddings") else dim
        parts = [weight] * num_shards if weight.dim() == 1 else weight.chunk(num_shards, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def write_ranks(path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in MERGES]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("The sea is warmer than it was.\nThe ice is thinner than it has been.\n")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


Checkpoint = Callable[..., tuple[Path, Weights, dict[str, Any]]]


@pytest.fixture
def checkpoint(tmp_path: Path, sentencepiece_model: Path) -> Checkpoint:
    """checkpoint(version, ...) -> folder, whole weights, params."""

    def make(
        version: str,
        *,
        num_shards: int = 1,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> tuple[Path, Weights, dict[str, Any]]:
        folder = tmp_path / "tiny"
        folder.mkdir()
        if version in ("1", "2"):
            shutil.copy(sentencepiece_model, folder / "tokenizer.model")
        else:
            write_ranks(folder / "tokenizer.model")
        params = make_params(version, **changes)
        weights = make_weights(params, 300 if version in ("1", "2") else NUM_RANKS + 256, tied=tied, dtype=dtype)
        (folder / "params.json").write_text(json.dumps(params))
        for n, shard in enumerate(split_weights(weights, num_shards, 1 if version in ("1", "2") else 0)):
            if version in ("1", "2"):
                shard["rope.freqs"] = torch.ones(8)
            torch.save(shard, folder / f"consolidated.{n:02}.pth")
        return folder, weights, params

    return make


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


def rewrite_shard(folder: Path, change: Callable[[Weights], Any], number: int = 0) -> None:
    path = folder / f"consolidated.{number:02}.pth"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


def convert_default(source: Path, target: Path, version: str = "3.2") -> dict[str, object]:
    return convert(source, target, llama_version=version, max_shard_gib=2.0)


def read_weights(folder: Path) -> Weights:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


# Meta's forward pass, after the equations in llama-models


def rotary_frequencies(head_dim: int, theta: float, factor: float | None) -> Tensor:
    """Radians per position; a factor leaves wavelengths below 2048 alone, multiplies those above 8192, blends between.

    In fp32 as in Meta's code: at position 20,000 the rounding of a frequency is seen in the fourth digit of a logit.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if factor is None:
        return frequencies
    turns = 8192 / (2 * math.pi / frequencies)  # in the original context
    kept = ((turns - 1) / 3).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def meta_logits(weights: Weights, params: dict[str, Any], theta: float, factor: float | None) -> Tensor:
    """Logits (length, vocab) of TOKENS at PLACES in fp32, with complex rotary pairs."""
    num_heads, num_kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    head_dim = params["dim"] // num_heads
    angles = torch.outer(PLACES.float(), rotary_frequencies(head_dim, theta, factor))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + params["norm_eps"]) * gain

    def rotate(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)

    x = weights["tok_embeddings.weight"][TOKENS]
    for n in range(params["n_layers"]):
        w = {name.removeprefix(f"layers.{n}."): v for name, v in weights.items() if name.startswith(f"layers.{n}.")}
        h = norm(x, w["attention_norm.weight"])
        q, k, v = ((h @ w[f"attention.w{c}.weight"].T).view(len(TOKENS), -1, head_dim) for c in "qkv")
        q, k = rotate(q), rotate(k)
        heads = []
        for head in range(num_heads):
            group = head * num_kv_heads // num_heads
            scores = (q[:, head] @ k[:, group].T / math.sqrt(head_dim)).masked_fill(LATER, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, -1) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


def hugging_face_logits(folder: Path) -> Any:
    """The same of a converted checkpoint. The mask is given: transformers takes jumps in position for new sequences."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    mask = torch.zeros(LATER.shape).masked_fill(LATER, torch.finfo().min)
    with torch.no_grad():
        return model(TOKENS[None], position_ids=PLACES[None], attention_mask=mask[None, None]).logits[0]


class TestLogits:
    @pytest.mark.parametrize(
        ("version", "num_shards", "tied", "n_kv_heads", "theta", "factor"),
        [
            pytest.param("1", 1, False, None, 10000.0, None, id="1"),
            pytest.param("2", 2, False, None, 10000.0, None, id="2, embedding split by features"),
            pytest.param("2", 2, False, 2, 10000.0, None, id="2, grouped queries"),
            pytest.param("3", 1, False, 2, 500000.0, None, id="3"),
            pytest.param("3.1", 2, False, 2, 500000.0, 8.0, id="3.1, two shards"),
            pytest.param("3.2", 1, True, 1, 500000.0, 32.0, id="3.2, tied, one key head"),
            pytest.param("3.2", 2, True, 2, 500000.0, 32.0, id="3.2, tied, two shards"),
        ],
    )
    def test_equal_metas(
        self,
        checkpoint: Checkpoint,
        target: Path,
        version: str,
        num_shards: int,
        tied: bool,
        n_kv_heads: int | None,
        theta: float,
        factor: float | None,
    ) -> None:
        source, weights, params = checkpoint(version, num_shards=num_shards, tied=tied, n_kv_heads=n_kv_heads)
        summary = convert_default(source, target, version)
        logits = hugging_face_logits(target)

        assert (logits - meta_logits(weights, params, theta, factor)).abs().max() < 1e-4
        for wrong in {None, 8.0, 32.0} - {factor}:
            assert (logits - meta_logits(weights, params, theta, wrong)).abs().max() > 0.1
        assert ("lm_head.weight" in read_weights(target)) is not tied
        assert summary["tied"] is tied
        assert summary["num_shards"] == num_shards
        assert (summary["rope_theta"], summary["rope_factor"]) == (theta, factor)

    def test_checkpoint_without_output_is_tied(self, checkpoint: Checkpoint, target: Path) -> None:
        source, weights, params = checkpoint("3.2", tied=True)
        rewrite_shard(source, lambda shard: shard.pop("output.weight"))

        assert convert_default(source, target)["tied"] is True
        expected = meta_logits(weights, params, 500000.0, 32.0)
        assert (hugging_face_logits(target) - expected).abs().max() < 1e-4

    def test_nearly_equal_embeddings_are_not_tied(self, checkpoint: Checkpoint, target: Path) -> None:
        source, *_ = checkpoint("3.2", tied=True)
        rewrite_shard(source, lambda shard: shard["output.weight"][-1, -1].add_(1.0))

        assert convert_default(source, target)["tied"] is False
        assert "lm_head.weight" in read_weights(target)


class TestFiles:
    @pytest.mark.parametrize(
        ("version", "context_length", "expected_rope"),
        [
            ("2", 4096, {"rope_type": "default", "rope_theta": 10000.0}),
            ("3", 8192, {"rope_type": "default", "rope_theta": 500000.0}),
            (
                "3.2",
                131072,
                {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
        ],
    )
    def test_config_as_transformers_reads_it(
        self, checkpoint: Checkpoint, target: Path, version: str, context_length: int, expected_rope: dict[str, Any]
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        source, *_ = checkpoint(version, norm_eps=2e-6)
        convert_default(source, target, version)
        config, tokenizer = AutoConfig.from_pretrained(target), AutoTokenizer.from_pretrained(target)

        assert config.rope_parameters == expected_rope
        assert config.max_position_embeddings == tokenizer.model_max_length == context_length
        assert config.intermediate_size == 88  # of w1, whatever the multiple_of 32 in params.json would make it
        assert config.rms_norm_eps == 2e-6
        assert config.vocab_size == len(tokenizer)
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        generation = GenerationConfig.from_pretrained(target)
        assert ids == (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)

    @pytest.mark.parametrize(("version", "theta"), [("1", 10000.0), ("3", 500000.0)])
    def test_rope_theta_where_params_have_none(
        self, checkpoint: Checkpoint, target: Path, version: str, theta: float
    ) -> None:
        source, _, params = checkpoint(version)
        params.pop("rope_theta", None)
        (source / "params.json").write_text(json.dumps(params))
        assert convert_default(source, target, version)["rope_theta"] == theta

    @pytest.mark.parametrize(
        ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")]
    )
    def test_dtype_is_kept(self, checkpoint: Checkpoint, target: Path, dtype: torch.dtype, name: str) -> None:
        source, weights, _ = checkpoint("3.1", dtype=dtype)
        summary = convert_default(source, target, "3.1")

        written = read_weights(target)
        assert summary["dtype"] == json.loads((target / "config.json").read_text())["dtype"] == name
        assert summary["num_parameters"] == sum(weight.numel() for weight in weights.values())
        assert {weight.dtype for weight in written.values()} == {dtype}
        assert torch.equal(written["model.layers.1.self_attn.v_proj.weight"], weights["layers.1.attention.wv.weight"])
        with safe_open(target / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes((target / "model.safetensors").read_bytes()[:8], "little") % 8 == 0  # aligned weights

    def test_weights_over_several_files(self, checkpoint: Checkpoint, tmp_path: Path, target: Path) -> None:
        source, *_ = checkpoint("3.2", num_shards=2)
        (other := tmp_path / "other").mkdir()
        convert_default(source, other)
        limit = 100_000
        summary = convert(source, target, llama_version="3.2", max_shard_gib=limit / 2**30)

        files = sorted(path.name for path in target.glob("*.safetensors"))
        assert len(files) == summary["num_files"] == 5
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        weights, expected = read_weights(target), read_weights(other)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
        for file in files:
            inside = load_file(target / file)
            assert len(inside) == 1 or sum(weight.nbytes for weight in inside.values()) <= limit
            assert {name for name, of in index["weight_map"].items() if of == file} == inside.keys()
        assert torch.equal(hugging_face_logits(target), hugging_face_logits(other))  # transformers reads the index

    @pytest.mark.parametrize("version", ["2", "3.2"])
    @pytest.mark.parametrize("slab_bytes", [1, 1500, 5000])
    def test_size_of_slabs_changes_nothing(
        self,
        checkpoint: Checkpoint,
        tmp_path: Path,
        target: Path,
        monkeypatch: pytest.MonkeyPatch,
        version: str,
        slab_bytes: int,
    ) -> None:
        source, *_ = checkpoint(version, num_shards=2, tied=version == "3.2")
        (other := tmp_path / "other").mkdir()
        convert_default(source, other, version)
        monkeypatch.setattr(safetensors_files, "SLAB_BYTES", slab_bytes)
        convert_default(source, target, version)
        assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}

    def test_progress(self, checkpoint: Checkpoint, target: Path) -> None:
        source, weights, _ = checkpoint("3.2", num_shards=2)
        calls: list[tuple[int, int]] = []
        convert(source, target, llama_version="3.2", max_shard_gib=2, progress=lambda *call: calls.append(call))
        total = sum(weight.nbytes for weight in weights.values())
        assert calls == sorted(calls)
        assert calls[-1] == (total, total)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
    def test_weights_are_mapped_not_read(self, checkpoint: Checkpoint) -> None:
        source, *_ = checkpoint("3.2", num_shards=2)
        shards = meta.read_shards(source)
        mapped = Path("/proc/self/maps").read_text()
        assert all(str(source / f"consolidated.0{n}.pth") in mapped for n in range(len(shards)))

    def test_old_torch_format(self, checkpoint: Checkpoint, tmp_path: Path, target: Path) -> None:
        source, weights, _ = checkpoint("3.2", dtype=torch.bfloat16)
        (other := tmp_path / "other").mkdir()
        convert_default(source, other)
        torch.save(weights, source / "consolidated.00.pth", _use_new_zipfile_serialization=False)
        convert_default(source, target)
        assert (target / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def set_params(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "params.json"
        params = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(params))

    return change


def drop_params(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "params.json"
        params = json.loads(path.read_text())
        del params[name]
        path.write_text(json.dumps(params))

    return change


def set_weight(name: str, shape: tuple[int, ...], number: int = 0, **kind: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_shard(folder, lambda w: w.update({name: torch.zeros(shape, **kind)}), number)


def drop_weight(name: str, number: int = 0) -> Callable[[Path], None]:
    return lambda folder: rewrite_shard(folder, lambda w: w.pop(name), number)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2000])  # type: ignore[return-value]


class TestBrokenCheckpoints:
    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda f: (f / "params.json").unlink(), ["params.json: no such file", "fetch it"]),
            (lambda f: (f / "params.json").write_text("{"), ["params.json: not JSON", "fetch the file again"]),
            (lambda f: (f / "params.json").write_text("[]"), ["params.json: must be a JSON object"]),
            (lambda f: (f / "tokenizer.model").unlink(), ["tokenizer.model: no such file"]),
            (lambda f: (f / "consolidated.00.pth").unlink(), ["consolidated.00.pth: no such file", "all shards"]),
            (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"), ["consolidated.01.pth: no such"]),
            (lambda f: (f / "consolidated.01.pth").unlink(), ["shape (32, 64), expected (64, 64)", "use all files"]),
            (cut("consolidated.01.pth"), ["consolidated.01.pth: not a torch checkpoint, or cut short", "fetch"]),
            (lambda f: (f / "consolidated.00.pth").write_bytes(b""), ["consolidated.00.pth: not a torch checkpoint"]),
            (lambda f: (f / "consolidated.00.pth").write_bytes(b"\x80\x02junk"), ["not a torch checkpoint"]),
            (lambda f: torch.save([1, 2], f / "consolidated.00.pth"), ["must hold weights by name"]),
            (set_params(dim=None), ["params.json: dim is null, must be a whole number from 1"]),
            (set_params(dim=10**12), ["dim is 1000000000000, must be a whole number from 1 to 1048576"]),
            (set_params(n_heads=0), ["n_heads is 0, must be"]),
            (set_params(n_heads="4"), ['n_heads is "4", must be']),
            (set_params(n_heads=True), ["n_heads is true, must be"]),
            (set_params(n_heads=5), ["dim is 64, must be a multiple of 2 * n_heads (10)"]),
            (set_params(n_kv_heads=3), ["n_heads is 4, must be a multiple of n_kv_heads (3)"]),
            (set_params(norm_eps=-1.0), ["norm_eps is -1.0, must be a number above 0"]),
            (drop_params("norm_eps"), ["norm_eps is null, must be a number above 0"]),
            (set_params(rope_theta="x"), ['rope_theta is "x", must be a number above 0']),
            (set_params(vocab_size=32000), ["vocab_size is 32000, but tok_embeddings.weight has 520 rows"]),
            (set_params(n_layers=3), ["no weights of layer 2, but n_layers is 3"]),
            (set_params(n_layers=1000000), ["no weights of layer 2, but n_layers is 1000000"]),
            (set_params(n_layers=1), ["unexpected weight layers.1.attention.wk.weight", "n_layers 1"]),
            (set_params(n_kv_heads=4), ["layers.0.attention.wk.weight has shape (16, 64), expected (32, 64)", "n_kv_"]),
            (set_params(dim=72), ["tok_embeddings.weight has shape (260, 64), expected (260, 36)", "dim 72"]),
            (drop_weight("layers.1.attention.wo.weight", 1), ["01.pth: no weight layers.1.attention.wo.weight"]),
            (drop_weight("output.weight", 1), ["01.pth: no weight output.weight"]),
            (drop_weight("tok_embeddings.weight"), ["00.pth: no weight tok_embeddings.weight"]),
            (set_weight("vision_model.conv.weight", (2, 2)), ["unexpected weight vision_model.conv.weight"]),
            (set_weight("norm.weight", (63,)), ["norm.weight has shape (63,), expected (64)"]),
            (set_weight("norm.weight", (64, 1)), ["norm.weight has shape (64, 1), expected 1 dimension"]),
            (set_weight("layers.0.feed_forward.w1.weight", ()), ["w1.weight has shape (), expected 2 dimension"]),
            (set_weight("layers.0.feed_forward.w1.weight", (0, 64)), ["w1.weight has shape (0, 64)"]),
            (set_weight("layers.1.feed_forward.w2.weight", (64, 45)), ["has shape (64, 45), expected (64, 44)"]),
            (set_weight("norm.weight", (64,), dtype=torch.int8), ["norm.weight is torch.int8", "unquantized"]),
            (
                set_weight("norm.weight", (64,), dtype=torch.bfloat16),
                ["norm.weight is torch.bfloat16", "torch.float32"],
            ),
            (
                lambda f: rewrite_shard(f, lambda w: w.update({"norm.weight": torch.zeros(1).expand(64)})),
                ["norm.weight is a strided view"],
            ),
        ],
    )
    def test_error_names_file_and_remedy(
        self, checkpoint: Checkpoint, target: Path, damage: Callable[[Path], None], words: list[str]
    ) -> None:
        source, *_ = checkpoint("3.2", num_shards=2)
        damage(source)
        with pytest.raises(InputError) as caught:
            convert_default(source, target)

        message = str(caught.value)
        assert message.startswith(str(source))
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert list(target.iterdir()) == []

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_in_a_pickle_is_not_run(self, checkpoint: Checkpoint, target: Path, zipped: bool) -> None:
        source, weights, _ = checkpoint("3.2")
        mark = target.parent / "code was run"
        weights["norm.weight"] = Command(mark)  # type: ignore[assignment]
        torch.save(weights, source / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)

        with pytest.raises(InputError, match=r"consolidated.00.pth: refused, it holds code to run \(.*mkdir\)"):
            convert_default(source, target)
        assert not mark.exists()

    @pytest.mark.parametrize(
        ("version", "scaled", "words"),
        [
            ("3", True, 'models.tiny.llama_version is "3", which has no scaled rope; set .* (3.1 or 3.2)'),
            (
                "3.1",
                False,
                'models.tiny.llama_version is "3.1", which has scaled rope (factor 8); set .* (1 or 2 or 3)',
            ),
            ("3.2", None, 'use_scaled_rope is false, but models.tiny.llama_version is "3.2", which has scaled rope'),
            ("2", True, 'models.tiny.llama_version is "2", which has no scaled rope'),
        ],
    )
    def test_scaled_rope_must_fit_the_version(
        self, checkpoint: Checkpoint, target: Path, version: str, scaled: bool | None, words: str
    ) -> None:
        source, _, params = checkpoint("3")
        if scaled is not None:
            (source / "params.json").write_text(json.dumps(params | {"use_scaled_rope": scaled}))
        with pytest.raises(InputError, match=re.escape(words).replace(r"\.\*", ".*")):
            convert_default(source, target, version)

    def test_tokenizer_must_fit_the_version(self, checkpoint: Checkpoint, target: Path) -> None:
        source, *_ = checkpoint("3")
        with pytest.raises(InputError, match=r'a tiktoken file.*models.tiny.llama_version is "2"'):
            convert_default(source, target, "2")

    def test_tokenizer_must_fit_the_embedding(
        self, checkpoint: Checkpoint, target: Path, sentencepiece_model: Path
    ) -> None:
        source, *_ = checkpoint("3", vocab_size=-1)
        lines = (source / "tokenizer.model").read_text().splitlines()
        (source / "tokenizer.model").write_text("\n".join(lines[:-1]))
        with pytest.raises(InputError, match=r"tokenizer.model: 519 tokens.*tok_embeddings.weight has 520 rows"):
            convert_default(source, target, "3")

    def test_unknown_version(self, checkpoint: Checkpoint, target: Path) -> None:
        source, *_ = checkpoint("3")
        with pytest.raises(InputError, match=r'models.tiny.llama_version: "4" is not.*use one of 1, 2, 3, 3.1, 3.2'):
            convert_default(source, target, "4")

    def test_meta_s_files_where_the_hub_keeps_them(self, tmp_path: Path, target: Path) -> None:
        (tmp_path / "original").mkdir()
        (tmp_path / "original/params.json").touch()
        words = f"{tmp_path}: Meta's files are in {tmp_path}/original, .* mv {tmp_path}/original/\\* {tmp_path}$"
        with pytest.raises(InputError, match=words):
            convert_default(tmp_path, target)

    def test_no_checkpoint(self, tmp_path: Path, target: Path) -> None:
        with pytest.raises(InputError, match=r"no checkpoint; looked for params.json.*config.json.*put one"):
            convert_default(tmp_path, target)

    def test_full_disk(self, checkpoint: Checkpoint, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, *_ = checkpoint("3.2")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 1000))
        with pytest.raises(InputError, match=r"base: 0.0 GiB to write, 0.0 GiB free; make room"):
            convert_default(source, target)
        assert list(target.iterdir()) == []


class Command:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


class TestHuggingFaceLayout:
    @pytest.fixture
    def source(self, checkpoint: Checkpoint, tmp_path: Path) -> Path:
        """A Hugging Face folder of several files, with what else such folders hold."""
        meta, *_ = checkpoint("3.2", tied=True)
        folder = tmp_path / "hugging_face"
        folder.mkdir()
        convert(meta, folder, llama_version="3.2", max_shard_gib=100_000 / 2**30)
        for name in ("README.md", "pytorch_model.bin", "model.gguf", "handler.py"):
            (folder / name).write_text("?")
        (folder / "special_tokens_map.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")  # where transformers 5 writes an Instruct model's
        (folder / "original").mkdir()
        return folder

    def test_is_copied_as_it_is(self, source: Path, target: Path) -> None:
        calls: list[tuple[int, int]] = []
        summary = convert(
            source, target, llama_version="3.2", max_shard_gib=2, progress=lambda *call: calls.append(call)
        )
        expected = {path.name for kind in ("*.json", "*.safetensors", "*.jinja") for path in source.glob(kind)}
        assert {path.name for path in target.iterdir()} == expected
        assert all((target / name).read_bytes() == (source / name).read_bytes() for name in expected)
        assert calls[-1][0] == calls[-1][1] == sum((target / name).stat().st_size for name in expected)
        num_files = len(list(source.glob("*.safetensors")))
        assert summary == {
            "layout": "huggingface",
            "num_parameters": sum(weight.numel() for weight in read_weights(source).values()),
            "num_shards": num_files,
            "num_files": num_files,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 88,
            "vocab_size": 520,
            "tied": True,
            "dtype": "float32",
            "rope_theta": 500000.0,
            "rope_factor": 32.0,
            "context_length": 131072,
        }

    def test_summary_is_that_of_the_meta_checkpoint(self, source: Path, target: Path, tmp_path: Path) -> None:
        (other := tmp_path / "other").mkdir()
        meta = convert(tmp_path / "tiny", other, llama_version="3.2", max_shard_gib=2)
        copied = convert_default(other, target)
        assert copied == meta | {"layout": "huggingface"}

    def test_older_config(self, source: Path, target: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
        (source / "config.json").write_text(json.dumps(config))
        summary = convert_default(source, target)
        assert (summary["rope_theta"], summary["rope_factor"], summary["dtype"]) == (500000.0, 32.0, "float32")

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ({"architectures": ["MistralForCausalLM"]}, ['["MistralForCausalLM"], must be ["LlamaForCausalLM"]']),
            ({"architectures": None}, ["config.json: architectures is null"]),
            ({"quantization_config": {}}, ["config.json: a quantized checkpoint; use the unquantized one"]),
            ({"num_hidden_layers": 3}, ["no weight model.layers.2.input_layernorm.weight", "fetch all files"]),
            ({"num_hidden_layers": None}, ["num_hidden_layers is null, must be a whole number"]),
            ({"tie_word_embeddings": False}, ["no weight lm_head.weight"]),
            ({"vocab_size": 600}, ["520 tokens in tokenizer.json, vocab_size 600 in config.json, 520 rows"]),
            ("tokenizer.json", ["tokenizer.json: no such file"]),
            (
                "model-00002-of-00004.safetensors",
                ["model-00002-of-00004.safetensors: no such file", "index.json names"],
            ),
            ("model.safetensors.index.json", ["weights only in pickled *.bin files", "convert them to safetensors"]),
        ],
    )
    def test_errors(self, source: Path, target: Path, damage: str | dict[str, Any], words: list[str]) -> None:
        if isinstance(damage, str):
            (source / damage).unlink()
        else:
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(config | damage))
        with pytest.raises(InputError) as caught:
            convert_default(source, target)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert list(target.iterdir()) == []

    def test_cut_weights(self, source: Path, target: Path) -> None:
        path = min(source.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match=rf"{path}: not a safetensors file, or cut short"):
            convert_default(source, target)

    def test_weights_outside_the_folder(self, source: Path, target: Path) -> None:
        index = source / "model.safetensors.index.json"
        index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
        with pytest.raises(InputError, match=r"no such file in the folder, which model.safetensors.index.json names"):
            convert_default(source, target)

    def test_damaged_tokenizer(self, source: Path, target: Path) -> None:
        (source / "tokenizer.json").write_text("{}")
        with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer \(.*\); fetch the file again"):
            convert_default(source, target)


def test_versions() -> None:
    assert LLAMA_VERSIONS == ("1", "2", "3", "3.1", "3.2")


def test_transformers_is_not_imported() -> None:
    heavy = "{'transformers', 'sentencepiece'}"
    code = f"import sys, pdf2lora.weights.conversion; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
