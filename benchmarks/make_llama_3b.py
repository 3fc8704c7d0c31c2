"""A checkpoint of Llama-3.2-3B's shape in Meta's layout, with random weights: speed and memory do not depend on them.

    python -m benchmarks.make_llama_3b <tokenizer.model> <folder>

tokenizer.model: Meta's own, of Llama 3 (it cannot be shipped here). 6.4 GB of bfloat16 in consolidated.00.pth.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

PARAMS = {
    "dim": 3072,
    "n_layers": 28,
    "n_heads": 24,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
INTERMEDIATE = 8192
STANDARD_DEVIATION = 0.02


def shapes() -> dict[str, tuple[int, ...]]:
    """Meta's names of the tensors; the head is the embedding."""
    dim, head_dim = PARAMS["dim"], PARAMS["dim"] // PARAMS["n_heads"]
    keys = PARAMS["n_kv_heads"] * head_dim
    found = {"tok_embeddings.weight": (PARAMS["vocab_size"], dim), "norm.weight": (dim,)}
    for layer in range(PARAMS["n_layers"]):
        found |= {
            f"layers.{layer}.attention.wq.weight": (dim, dim),
            f"layers.{layer}.attention.wk.weight": (keys, dim),
            f"layers.{layer}.attention.wv.weight": (keys, dim),
            f"layers.{layer}.attention.wo.weight": (dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": (INTERMEDIATE, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, INTERMEDIATE),
            f"layers.{layer}.feed_forward.w3.weight": (INTERMEDIATE, dim),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    return found


def main() -> None:
    tokenizer, folder = map(Path, sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, device=device) * STANDARD_DEVIATION).to("cpu", torch.bfloat16)
        for name, shape in shapes().items()
    }
    weights["output.weight"] = weights["tok_embeddings.weight"]
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS, indent=2) + "\n")
    shutil.copy(tokenizer, folder / "tokenizer.model")
    print(f"{folder}: {sum(map(torch.numel, weights.values())) - weights['output.weight'].numel():,} parameters")


if __name__ == "__main__":
    main()
