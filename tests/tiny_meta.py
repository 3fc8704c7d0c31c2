"""A tiny random source model in Meta's layout: 2 layers, hidden size 64, and the tokenizer of its Llama version."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizer_texts import SENTENCEPIECE_VOCAB_SIZE, rank_lines, train_sentencepiece
from torch import Tensor

from pdf2lora.weights.conversion import convert

MERGES = [b"th", b"the", b" t", b" the", b"an", b"and", b" a", b" and"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *MERGES])}
VOCAB_SIZE = len(RANKS) + 256  # since Llama 3
INTERMEDIATE_SIZE = 88  # differs from the rule of params.json
Weights = dict[str, Tensor]


def write_tiny_meta(
    folder: Path,
    version: str,
    *,
    num_shards: int = 1,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[Weights, dict[str, Any]]:
    """Writes all files to a new folder. Returns the whole weights and the content of params.json.

    changes: of params.json.
    """
    folder.mkdir()
    has_sentencepiece = version in ("1", "2")
    if has_sentencepiece:
        train_sentencepiece(folder)
    else:
        (folder / "tokenizer.model").write_text("\n".join(rank_lines(RANKS)))
    params = make_params(version, **changes)
    vocab_size = SENTENCEPIECE_VOCAB_SIZE if has_sentencepiece else VOCAB_SIZE
    weights = make_weights(params, vocab_size, tied=tied, dtype=dtype)
    (folder / "params.json").write_text(json.dumps(params))
    for n, shard in enumerate(split_weights(weights, num_shards, embedding_dim=1 if has_sentencepiece else 0)):
        if has_sentencepiece:
            shard["rope.freqs"] = torch.ones(8)
        torch.save(shard, folder / f"consolidated.{n:02}.pth")
    return weights, params


def make_params(version: str, **changes: Any) -> dict[str, Any]:
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "multiple_of": 32}
    if version in ("1", "2"):
        params |= {"vocab_size": -1}
    else:
        params |= {"vocab_size": VOCAB_SIZE, "rope_theta": 500000.0}
    if version in ("3.1", "3.2", "3.3"):
        params["use_scaled_rope"] = True
    return params | changes


def make_weights(params: dict[str, Any], vocab_size: int, *, tied: bool, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights so large that every part of the model changes the logits."""
    draw = torch.Generator().manual_seed(7)
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]

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
            f"layers.{n}.feed_forward.w1.weight": matrix(INTERMEDIATE_SIZE, dim),
            f"layers.{n}.feed_forward.w2.weight": matrix(dim, INTERMEDIATE_SIZE),
            f"layers.{n}.feed_forward.w3.weight": matrix(INTERMEDIATE_SIZE, dim),
            f"layers.{n}.attention_norm.weight": norm(),
            f"layers.{n}.ffn_norm.weight": norm(),
        }
    weights["norm.weight"] = norm()
    weights["output.weight"] = weights["tok_embeddings.weight"].clone() if tied else matrix(vocab_size, dim)
    return weights


def split_weights(weights: Weights, num_shards: int, *, embedding_dim: int) -> list[Weights]:
    """Model-parallel shards, split as by fairscale's layers; `embedding_dim`: the split dimension of the embedding."""
    shards: list[Weights] = [{} for _ in range(num_shards)]
    for name, weight in weights.items():
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        dim = embedding_dim if name.startswith("tok_embeddings") else dim
        parts = [weight] * num_shards if weight.dim() == 1 else weight.chunk(num_shards, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def rewrite_shard(folder: Path, change: Callable[[Weights], Any], number: int = 0) -> None:
    path = folder / f"consolidated.{number:02}.pth"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


def rewrite_json(path: Path, *, without: str | None = None, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key != without}))


def convert_default(source: Path, target: Path, version: str = "3.2", max_shard_gib: float = 2.0) -> dict[str, object]:
    """Converts into a new folder or an empty one."""
    target.mkdir(exist_ok=True)
    return convert(source, target, llama_version=version, max_shard_gib=max_shard_gib)


def read_weights(folder: Path) -> Weights:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}
