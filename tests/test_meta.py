"""Source models in Meta's layout against Meta's forward pass, and damaged ones."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_meta import (
    INTERMEDIATE_SIZE,
    Weights,
    convert_default,
    read_weights,
    rewrite_json,
    rewrite_shard,
    write_tiny_meta,
)
from torch import Tensor

from pdf2lora.errors import InputError

TOKENS = torch.tensor([5, 250, 99, 17, 201, 99, 42])
# Far apart, because attention sees the distances between positions.
POSITIONS = torch.tensor([0, 1, 700, 3000, 9000, 9001, 20000])
FUTURE = torch.ones(len(TOKENS), len(TOKENS)).triu(1).bool()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "tiny"


def rotary_frequencies(head_dim: int, theta: float, factor: float | None) -> Tensor:
    """Radians per position. The factor stretches wavelengths above 8192, keeps those below 2048, blends between.

    In fp32 as in Meta's code: at position 20,000 the rounding of a frequency changes the fourth digit of a logit.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if factor is None:
        return frequencies
    turns = 8192 / (2 * math.pi / frequencies)  # in the original context
    kept = ((turns - 1) / 3).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def meta_logits(weights: Weights, params: dict[str, Any], theta: float, factor: float | None) -> Tensor:
    """Logits (length, vocab) of TOKENS at POSITIONS in fp32, with complex rotary pairs."""
    num_heads, num_kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    head_dim = params["dim"] // num_heads
    angles = torch.outer(POSITIONS.float(), rotary_frequencies(head_dim, theta, factor))
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
            scores = (q[:, head] @ k[:, group].T / math.sqrt(head_dim)).masked_fill(FUTURE, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, -1) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


def hugging_face_logits(folder: Path) -> Any:
    """The same of a converted model. An explicit mask, because transformers takes a jump in position for a new text."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    mask = torch.zeros(FUTURE.shape).masked_fill(FUTURE, torch.finfo().min)
    with torch.no_grad():
        return model(TOKENS[None], position_ids=POSITIONS[None], attention_mask=mask[None, None]).logits[0]


class TestLogits:
    @pytest.mark.parametrize(
        ("version", "num_shards", "tied", "n_kv_heads", "theta", "factor"),
        [
            pytest.param("1", 1, False, None, 10000.0, None, id="1"),
            pytest.param("2", 2, False, None, 10000.0, None, id="2, embedding split by features"),
            pytest.param("2", 2, False, 2, 10000.0, None, id="2, grouped queries"),
            pytest.param("3", 1, False, 2, 500000.0, None, id="3"),
            pytest.param("3.1", 2, False, 2, 500000.0, 8.0, id="3.1, two shards"),
            pytest.param("3.3", 1, False, 2, 500000.0, 8.0, id="3.3"),
            pytest.param("3.2", 1, True, 1, 500000.0, 32.0, id="3.2, tied, one key head"),
            pytest.param("3.2", 2, True, 2, 500000.0, 32.0, id="3.2, tied, two shards"),
        ],
    )
    def test_equal_metas(
        self,
        source: Path,
        target: Path,
        version: str,
        num_shards: int,
        tied: bool,
        n_kv_heads: int | None,
        theta: float,
        factor: float | None,
    ) -> None:
        weights, params = write_tiny_meta(source, version, num_shards=num_shards, tied=tied, n_kv_heads=n_kv_heads)
        summary = convert_default(source, target, version)
        logits = hugging_face_logits(target)

        assert (logits - meta_logits(weights, params, theta, factor)).abs().max() < 1e-4
        for wrong in {None, 8.0, 32.0} - {factor}:
            assert (logits - meta_logits(weights, params, theta, wrong)).abs().max() > 0.1
        assert ("lm_head.weight" in read_weights(target)) is not tied
        assert summary["tied"] is tied
        assert summary["num_shards"] == num_shards
        assert (summary["rope_theta"], summary["rope_factor"]) == (theta, factor)

    def test_a_model_without_an_output_weight_is_tied(self, source: Path, target: Path) -> None:
        weights, params = write_tiny_meta(source, "3.2", tied=True)
        rewrite_shard(source, lambda shard: shard.pop("output.weight"))

        assert convert_default(source, target)["tied"] is True
        expected = meta_logits(weights, params, 500000.0, 32.0)
        assert (hugging_face_logits(target) - expected).abs().max() < 1e-4

    def test_nearly_equal_embeddings_are_not_tied(self, source: Path, target: Path) -> None:
        write_tiny_meta(source, "3.2", tied=True)
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
        self, source: Path, target: Path, version: str, context_length: int, expected_rope: dict[str, Any]
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        write_tiny_meta(source, version, norm_eps=2e-6)
        convert_default(source, target, version)
        config, tokenizer = AutoConfig.from_pretrained(target), AutoTokenizer.from_pretrained(target)

        assert config.rope_parameters == expected_rope
        assert config.max_position_embeddings == tokenizer.model_max_length == context_length
        assert config.intermediate_size == INTERMEDIATE_SIZE  # of w1, not by the rule of params.json
        assert config.rms_norm_eps == 2e-6
        assert config.vocab_size == len(tokenizer)
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        generation = GenerationConfig.from_pretrained(target)
        assert ids == (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)

    @pytest.mark.parametrize(("version", "theta"), [("1", 10000.0), ("3", 500000.0)])
    def test_rope_theta_where_params_have_none(self, source: Path, target: Path, version: str, theta: float) -> None:
        _, params = write_tiny_meta(source, version)
        params.pop("rope_theta", None)
        (source / "params.json").write_text(json.dumps(params))
        assert convert_default(source, target, version)["rope_theta"] == theta

    @pytest.mark.parametrize(
        ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")]
    )
    def test_dtype_is_kept(self, source: Path, target: Path, dtype: torch.dtype, name: str) -> None:
        weights, _ = write_tiny_meta(source, "3.1", dtype=dtype)
        summary = convert_default(source, target, "3.1")

        written = read_weights(target)
        assert summary["dtype"] == json.loads((target / "config.json").read_text())["dtype"] == name
        assert summary["num_parameters"] == sum(weight.numel() for weight in weights.values())
        assert {weight.dtype for weight in written.values()} == {dtype}
        assert torch.equal(written["model.layers.1.self_attn.v_proj.weight"], weights["layers.1.attention.wv.weight"])
        with safe_open(target / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes((target / "model.safetensors").read_bytes()[:8], "little") % 8 == 0  # aligned weights


def set_params(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_json(folder / "params.json", **changes)


def set_weight(name: str, shape: tuple[int, ...], number: int = 0, **kind: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_shard(folder, lambda w: w.update({name: torch.zeros(shape, **kind)}), number)


def drop_weight(name: str, number: int = 0) -> Callable[[Path], None]:
    return lambda folder: rewrite_shard(folder, lambda w: w.pop(name), number)


class TestDamagedSourceModels:
    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (
                set_params(vocab_size=32000),
                ["vocab_size is 32000, but tok_embeddings.weight has 520 rows"],
            ),
            (
                set_params(n_layers=3),
                ["the weights of layer 2 are missing, but n_layers is 3"],
            ),
            (
                set_params(n_layers=1000000),
                ["the weights of layer 2 are missing, but n_layers is 1000000"],
            ),
            (
                set_params(n_layers=1),
                ["the weight layers.1.attention.wk.weight is not part", "n_layers 1"],
            ),
            (
                set_params(n_kv_heads=4),
                ["layers.0.attention.wk.weight has shape (16, 64), expected (32, 64)", "n_kv_"],
            ),
            (
                set_params(dim=72),
                ["tok_embeddings.weight has shape (260, 64), expected (260, 36)", "dim 72"],
            ),
            (
                drop_weight("layers.1.attention.wo.weight", 1),
                ["01.pth: the weight layers.1.attention.wo.weight is missing"],
            ),
            (drop_weight("output.weight", 1), ["01.pth: the weight output.weight is missing"]),
            (drop_weight("tok_embeddings.weight"), ["00.pth: the weight tok_embeddings.weight is missing"]),
            (set_weight("vision_model.conv.weight", (2, 2)), ["the weight vision_model.conv.weight is not part"]),
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
        self, source: Path, target: Path, damage: Callable[[Path], None], words: list[str]
    ) -> None:
        write_tiny_meta(source, "3.2", num_shards=2)
        damage(source)
        with pytest.raises(InputError) as caught:
            convert_default(source, target)

        message = str(caught.value)
        assert message.startswith(str(source))
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert list(target.iterdir()) == []

    def test_tokenizer_must_fit_the_version(self, source: Path, target: Path) -> None:
        write_tiny_meta(source, "3")
        with pytest.raises(InputError, match=r'this is a tiktoken file.*models.tiny.llama_version is "2"'):
            convert_default(source, target, "2")

    def test_tokenizer_must_fit_the_embedding(self, source: Path, target: Path) -> None:
        write_tiny_meta(source, "3", vocab_size=-1)
        lines = (source / "tokenizer.model").read_text().splitlines()
        (source / "tokenizer.model").write_text("\n".join(lines[:-1]))
        with pytest.raises(InputError, match=r"tokenizer has 519 tokens.*tok_embeddings.weight has 520 rows"):
            convert_default(source, target, "3")

    def test_full_disk(self, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tiny_meta(source, "3.2")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 1000))
        with pytest.raises(InputError, match=r"base: 0.0 GiB are needed, 0.0 GiB are free. Free some space"):
            convert_default(source, target)
        assert list(target.iterdir()) == []
