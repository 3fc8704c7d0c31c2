"""Trains the demo's base model: general text, tokenizer.model -> models/source/demo, a Llama 3.2 of 5M parameters.

    python -m demo.model.train TEXT_FOLDER [--epochs N --dropout P --target FOLDER --dim N --layers N ...]

The training starts from random weights and sees only the public-domain prose in TEXT_FOLDER, not the climate documents
in data/pdfs/demo. The output is in Meta's layout: params.json, consolidated.00.pth (bf16), tokenizer.model,
training.json (settings, loss by epoch, perplexity on held-out books). Layers and names of weights are those of Meta's
llama-models (models/llama3/model.py): grouped queries, interleaved rotary pairs, scaled rope, SwiGLU.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken.load import load_tiktoken_bpe
from torch import Tensor, nn

from demo.model.text import train_and_held_out
from pdf2lora.weights.tiktoken_files import LLAMA3_SPLIT

ROPE_FACTOR, ROPE_LOW, ROPE_HIGH, ROPE_ORIGINAL_CONTEXT = 32.0, 1.0, 4.0, 8192  # Llama 3.2


@dataclass(frozen=True)
class Shape:
    """params.json of Meta's Llama 3.2, small enough for git."""

    dim: int = 256
    n_layers: int = 5
    n_heads: int = 8
    n_kv_heads: int = 4
    vocab_size: int = 4096
    ffn_dim: int = 768
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0

    def params_json(self) -> dict[str, object]:
        """Meta's rule for the feed-forward size: 2/3 * 4 * dim * multiplier, rounded up to multiple_of."""
        shape = {name: value for name, value in asdict(self).items() if name != "ffn_dim"}
        multiplier = self.ffn_dim / (8 * self.dim / 3)
        return shape | {"ffn_dim_multiplier": round(multiplier, 4), "multiple_of": 64, "use_scaled_rope": True}


def rotary(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, head_dim / 2). Long wavelengths are stretched as in Llama 3.1 and 3.2."""
    head_dim = shape.dim // shape.n_heads
    frequency = shape.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    wavelengths_in_context = ROPE_ORIGINAL_CONTEXT * frequency / (2 * math.pi)
    keep = ((wavelengths_in_context - ROPE_LOW) / (ROPE_HIGH - ROPE_LOW)).clamp(0, 1)
    frequency = frequency * (keep + (1 - keep) / ROPE_FACTOR)
    angle = torch.outer(torch.arange(length).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (batch, length, heads, head_dim), with neighbouring features as pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.dim // shape.n_heads
        self.wq = nn.Linear(shape.dim, shape.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(shape.n_heads * self.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k, v = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        return self.wo(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        )


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.w2 = nn.Linear(shape.ffn_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), self.dropout, self.training)


class Llama(nn.Module):
    def __init__(self, shape: Shape, dropout: float, length: int):
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.n_layers) if into_residual else 0.02)
        self.output.weight = self.tok_embeddings.weight  # tied
        cos, sin = rotary(shape, length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token; tokens and targets: (batch, length)."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def tokenizer(model: Path) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(model))
    special = {"<|begin_of_text|>": len(ranks), "<|end_of_text|>": len(ranks) + 1}
    return tiktoken.Encoding("demo", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def pack(pieces: list[str], encoding: tiktoken.Encoding, length: int, seed: int | None = None) -> Tensor:
    """begin_of_text, piece, end_of_text, begin_of_text, ... in sequences of length + 1 (inputs and next tokens)."""
    begin, end = encoding.n_vocab - 2, encoding.n_vocab - 1
    order = np.arange(len(pieces)) if seed is None else np.random.default_rng(seed).permutation(len(pieces))
    encoded = encoding.encode_ordinary_batch([pieces[i] for i in order])
    stream = np.concatenate([np.array([begin, *tokens, end], dtype=np.int64) for tokens in encoded])
    rows = (len(stream) - 1) // length
    return torch.from_numpy(np.stack([stream[r * length : r * length + length + 1] for r in range(rows)]))


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor, device: str) -> float:
    model.eval()
    with torch.autocast(device, torch.bfloat16):
        total = sum(
            float(model(batch[:, :-1].to(device), batch[:, 1:].to(device))) * len(batch) for batch in rows.split(64)
        )
    model.train()
    return total / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--target", type=Path, default=Path("models/source/demo"))
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=Shape.dim)
    parser.add_argument("--layers", type=int, default=Shape.n_layers)
    parser.add_argument("--heads", type=int, default=Shape.n_heads)
    parser.add_argument("--kv-heads", type=int, default=Shape.n_kv_heads)
    parser.add_argument("--ffn-dim", type=int, default=Shape.ffn_dim)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    shape = Shape(args.dim, args.layers, args.heads, args.kv_heads, ffn_dim=args.ffn_dim)
    encoding = tokenizer(args.target / "tokenizer.model")
    train, held_out = train_and_held_out(args.text)
    held_out_rows = pack(held_out, encoding, args.length)
    model = Llama(shape, args.dropout, args.length).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    step_model = torch.compile(model) if device == "cuda" else model
    num_steps = args.epochs * (len(pack(train, encoding, args.length)) // args.batch)
    warmup = min(200, num_steps // 10)
    step, started, history = 0, time.monotonic(), []
    for epoch in range(args.epochs):
        rows = pack(train, encoding, args.length, seed=args.seed + epoch)  # a new order in each epoch
        rows = rows[torch.from_numpy(np.random.default_rng(epoch).permutation(len(rows)))].to(device)
        losses = []
        for batch in rows[: len(rows) // args.batch * args.batch].split(args.batch):
            step += 1
            decay = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / (num_steps - warmup))))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(1.0, step / warmup) * decay
            with torch.autocast(device, torch.bfloat16):
                loss = step_model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        history.append(
            {
                "epoch": epoch + 1,
                "train_nats": round(float(torch.stack(losses).mean()), 4),
                "held_out_nats": round(held_out_loss(step_model, held_out_rows, device), 4),
            }
        )
        print(history[-1], f"{time.monotonic() - started:.0f} s", flush=True)

    num_tokens = held_out_rows.numel() - len(held_out_rows)
    words = sum(len(piece.split()) for piece in held_out)
    nats = history[-1]["held_out_nats"]
    args.target.mkdir(parents=True, exist_ok=True)
    (args.target / "params.json").write_text(json.dumps(shape.params_json(), indent=2) + "\n")
    weights = {name: weight.to(torch.bfloat16).cpu() for name, weight in model.state_dict().items()}
    weights["output.weight"] = weights["tok_embeddings.weight"]  # the same storage, so the file holds it once
    torch.save(weights, args.target / "consolidated.00.pth")
    summary = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "trained_on": "public-domain English prose (Project Gutenberg), no climate documents",
        "train_tokens_per_epoch": rows.numel() - len(rows),
        "settings": {name: value for name, value in vars(args).items() if name not in ("text", "target")},
        "held_out": {"tokens": num_tokens, "words": words, "perplexity": round(math.exp(nats), 3)},
        "history": history,
    }
    (args.target / "training.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
