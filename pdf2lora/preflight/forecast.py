"""What a run will take before it runs: sequences, steps, memory, minutes, disk, and how each number is known.

How: `counted` in data that is there, `measured` on this machine by a run before this one, `computed` from other
numbers, or a `rule` of thumb, which may be off by a factor of two.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pdf2lora.params import ALL_LINEAR, Lora, Params, Quantization
from pdf2lora.preflight.environment import GIB, Gpu
from pdf2lora.training.throughput import peak_flop_per_s

CHARACTERS_PER_PAGE = 2900  # the demo's mean after cleaning
CHARACTERS_PER_TOKEN = 4.0  # English prose in Llama 3's vocabulary, rounded down
COUNTED_CHARACTERS = 2_000_000  # of the training text: tokens of more are in proportion
LISTED_PDFS = 200  # whose pages are counted: of more in proportion
# Of one token, forward and backward: 2 FLOP a parameter forward, 2 through the frozen weights backward, 2 more to
# compute the forward again with checkpointing. Not counted: attention's scores, LoRA, the head's gradient.
FLOP_PER_PARAMETER = 6
GPU_SHARE = 0.3  # of the data sheet's rate, a guess to the low side
CPU_GFLOPS = 10  # of one core, float32 with AVX2: the demo on two cores

How = Literal["counted", "measured", "computed", "rule", "unknown"]


@dataclass(frozen=True)
class Estimate:
    what: str
    text: str
    how: How
    why: str


@dataclass(frozen=True)
class Shape:
    """What a Llama's size follows from, all but num_bytes in numbers of parameters or features."""

    num_layers: int
    hidden_size: int
    query_size: int
    kv_size: int
    intermediate_size: int
    vocab_size: int
    num_parameters: int
    num_bytes: int  # of the checkpoint's weights

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: input features, output features."""
        hidden, query, kv, wide = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        return {
            "q_proj": (hidden, query), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (query, hidden),
            "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
        }  # fmt: skip

    def lora_parameters(self, lora: Lora) -> int:
        """A and B of each target: r x (in + out); DoRA adds out magnitudes."""
        names = self.layers if lora.target_modules == ALL_LINEAR else lora.target_modules
        targets = [self.layers[name] for name in names if name in self.layers]
        return self.num_layers * sum(lora.r * (i + o) + (o if lora.use_dora else 0) for i, o in targets)

    def base_gib(self, quantization: Quantization) -> float:
        """The frozen base: embeddings in 16 bits, linear layers in 4 (and their scales), 8 or 16."""
        scales = 0.127 if quantization.bnb_4bit_use_double_quant else 0.5  # bits a weight (Dettmers et al. 2023)
        bits = quantization.bits + (scales if quantization.bits == 4 else 0)
        embedding = self.vocab_size * self.hidden_size
        return (embedding * 16 + (self.num_parameters - embedding) * bits) / 8 / GIB


def read_shape(checkpoint: Path) -> Shape:
    """From params.json or config.json, and the sizes of the files of weights (16 bits a weight): none is opened."""
    is_meta = (checkpoint / "params.json").exists()
    given = json.loads((checkpoint / ("params.json" if is_meta else "config.json")).read_text(encoding="utf-8"))
    files = [f for f in checkpoint.iterdir() if f.suffix == (".pth" if is_meta else ".safetensors")]
    num_bytes = sum(file.stat().st_size for file in files)
    if is_meta:
        hidden, heads = given["dim"], given["n_heads"]
        kv_heads = given.get("n_kv_heads") or heads
        wide = int((given.get("ffn_dim_multiplier") or 1) * int(8 * hidden / 3))  # as in meta-llama's model.py
        multiple = given.get("multiple_of", 256)
        wide = multiple * -(-wide // multiple)
        layers, vocabulary = given["n_layers"], max(given.get("vocab_size", 0), 0) or 32000
    else:
        hidden, heads = given["hidden_size"], given["num_attention_heads"]
        kv_heads, wide = given.get("num_key_value_heads") or heads, given["intermediate_size"]
        layers, vocabulary = given["num_hidden_layers"], given["vocab_size"]
    head = given.get("head_dim") or hidden // heads
    return Shape(layers, hidden, head * heads, head * kv_heads, wide, vocabulary, num_bytes // 2, num_bytes)


class Before:
    """What earlier runs left: dvc.lock says what they ran on, and a number counts only where that is what runs now."""

    def __init__(self, params: Params, *, lock: dict[str, Any], machine: dict[str, Any], batch: dict[str, Any]):
        self.params = params.model_dump()
        self.stages: dict[str, Any] = lock.get("stages", {})
        self.machine = machine
        self.batch = batch

    def read(self, stage: str, path: str) -> bool:
        return any(dep["path"] == path for dep in self.stages.get(stage, {}).get("deps", ()))

    def had(self, stage: str) -> bool:
        """Whether a stage last ran with its part of params.yaml as it is now."""
        locked = self.stages.get(stage, {}).get("params", {}).get("params.yaml", {})
        return bool(locked) and all(self._now(key) == value for key, value in locked.items())

    def _now(self, key: str) -> Any:
        """The value that a key of dvc.lock, `lora` or `train.optim`, has in params.yaml."""
        value: Any = self.params
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def text_is_current(self) -> bool:
        corpus = f"data/pdfs/{self.params['corpus']}"
        return self.read("extract", corpus) and self.had("extract") and self.had("split")

    @property
    def base_is_current(self) -> bool:
        return self.read("convert", f"models/source/{self.params['model']}")


def count_tokens(texts: Sequence[str], tokenizer: Path) -> tuple[int, bool]:
    """Tokens of the texts, with bos and eos, and whether all of them were counted."""
    from tokenizers import Tokenizer

    counted, characters = 0, 0
    encoder = Tokenizer.from_file(str(tokenizer))
    for text in texts:
        counted += len(encoder.encode(text, add_special_tokens=False)) + 2
        characters += len(text)
        if characters > COUNTED_CHARACTERS:
            total = sum(len(text) for text in texts)
            return round(counted * total / characters), characters >= total
    return counted, True


def count_pages(files: Sequence[Path], max_pages: int) -> int:
    """Pages that extract will read, counted by pdfium in a process of its own, for a hostile PDF may end it."""
    listed = files[:: max(1, len(files) // LISTED_PDFS)]
    code = (
        "import sys, pypdfium2\n"
        "for file in sys.argv[2:]:\n"
        "    try: print(min(int(sys.argv[1]), len(pypdfium2.PdfDocument(file))), flush=True)\n"
        "    except pypdfium2.PdfiumError: print(0, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(max_pages), *map(str, listed)]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except subprocess.TimeoutExpired as expired:
        printed = (expired.stdout or b"").decode()
    pages = [int(line) for line in printed.split()]
    return round(sum(pages) * len(files) / max(1, len(pages)))


def steps(num_sequences: int, effective_batch: int, num_train_epochs: float) -> int:
    """Optimizer steps, as the Trainer counts them: the last one of an epoch may be smaller."""
    return math.ceil(num_train_epochs * math.ceil(num_sequences / effective_batch))


def memory_estimate(before: Before, params: Params, shape: Shape) -> Estimate:
    adapter_gib = shape.lora_parameters(params.lora) * (4 + 4 + 2) / GIB  # weights, gradients, 8-bit moments
    fixed = shape.base_gib(params.quantization) + adapter_gib
    batch = before.batch
    if before.had("find_batch") and before.base_is_current and batch:
        mode, chosen = batch.get("gradient_checkpointing"), batch["per_device_batch"]
        fitting = [p for p in batch["probes"] if p["fits"] and p.get("gradient_checkpointing") == mode]
        peak = min((p["peak_gib"] for p in fitting if p["batch"] >= chosen), default=None)
        if peak is not None:
            return Estimate(
                "memory",
                f"up to {peak:.2f} GiB with {chosen} sequences at a time, budget {batch['budget_gib']:.2f}",
                "measured",
                f"metrics/batch.json, found on: {batch['device']}",
            )
    return Estimate(
        "memory",
        f"{fixed:.2f} GiB and what the sequences take",
        "computed",
        f"base in {params.quantization.bits} bits, {shape.lora_parameters(params.lora):,} LoRA parameters; "
        "find_batch measures the rest",
    )


def time_estimate(before: Before, params: Params, shape: Shape, gpus: Sequence[Gpu], num_tokens: int) -> Estimate:
    tokens = num_tokens * params.train.num_train_epochs
    measured = before.machine.get("train", {}).get("tokens_per_s")
    here = gpus[0].name if gpus else None
    same_length = before.stages.get("train", {}).get("params", {}).get("params.yaml", {}).get("train", {})
    if (
        measured
        and before.machine.get("machine", {}).get("gpu") == here
        and before.base_is_current
        and same_length.get("seq_length") == params.compute.seq_length
    ):
        others = {
            n: e["seconds"] for n, e in before.machine.items() if n not in ("machine", "train") and "seconds" in e
        }
        also = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in others.items())
        return Estimate(
            "time",
            _minutes(tokens / measured),
            "measured",
            f"train ran at {measured:,} tokens/s; beside it {also or '-'}",
        )
    flop = FLOP_PER_PARAMETER * shape.num_parameters * tokens
    if not gpus:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Estimate(
            "time", _minutes(flop / (CPU_GFLOPS * 1e9 * cores)), "rule", f"{CPU_GFLOPS} GFLOP/s a core, {cores} cores"
        )
    peak = peak_flop_per_s(gpus[0].name)
    if peak is None:
        return Estimate("time", "-", "unknown", f"nothing is known of the speed of {gpus[0].name}; find_batch measures")
    return Estimate(
        "time",
        _minutes(flop / (GPU_SHARE * peak)),
        "rule",
        f"{GPU_SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s, training alone",
    )


def disk_gib(before: Before, shape: Shape) -> float:
    """What a run adds: models/base and its copy in DVC's cache, unless they are there."""
    return 0.0 if before.base_is_current and Path("models/base").is_dir() else 2 * shape.num_bytes / GIB


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
