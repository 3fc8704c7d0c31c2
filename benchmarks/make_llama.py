"""Writes a random source model with Llama-3.2-3B's or Llama-3.1-8B's shape in Meta's layout.

    python -m benchmarks.make_llama <3b|8b> <tokenizer.model> <folder>

Speed and memory do not depend on the weights. tokenizer.model is Meta's file for Llama 3, which this project must not
contain. The weights are 6.4 GB or 16 GB in bfloat16.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

COMMON = {
    "vocab_size": 128256,
    "n_kv_heads": 8,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
PARAMS: dict[str, dict[str, Any]] = {
    "3b": {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0} | COMMON,
    "8b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3} | COMMON | {"multiple_of": 1024},
}
INTERMEDIATE = {"3b": 8192, "8b": 14336}
STANDARD_DEVIATION = 0.02


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights, by Meta's names. The 3B has no separate head: it is the embedding."""
    params, intermediate = PARAMS[size], INTERMEDIATE[size]
    dim = params["dim"]
    keys = params["n_kv_heads"] * dim // params["n_heads"]
    found = {"tok_embeddings.weight": (params["vocab_size"], dim), "norm.weight": (dim,)}
    if size == "8b":
        found["output.weight"] = (params["vocab_size"], dim)
    for layer in range(params["n_layers"]):
        found |= {
            f"layers.{layer}.attention.wq.weight": (dim, dim),
            f"layers.{layer}.attention.wk.weight": (keys, dim),
            f"layers.{layer}.attention.wv.weight": (keys, dim),
            f"layers.{layer}.attention.wo.weight": (dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": (intermediate, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, intermediate),
            f"layers.{layer}.feed_forward.w3.weight": (intermediate, dim),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    return found


def main() -> None:
    size = sys.argv[1]
    tokenizer, folder = map(Path, sys.argv[2:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, device=device) * STANDARD_DEVIATION).to("cpu", torch.bfloat16)
        for name, shape in shapes(size).items()
    }
    num_parameters = sum(map(torch.numel, weights.values()))
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS[size], indent=2) + "\n")
    shutil.copy(tokenizer, folder / "tokenizer.model")
    print(f"{folder}: {num_parameters:,} parameters")


if __name__ == "__main__":
    main()
