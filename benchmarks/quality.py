"""Test perplexity after fine-tuning with each of compute.kernels, over several seeds: what an approximation costs.

    python -m benchmarks.quality <results.json> [<seed> ...]

Trains on models/base and data/split as train does, with the settings of params.yaml except compute.kernels and
train.seed; train.effective_batch, a number, is one batch. Every adapter is scored by the reference in bfloat16, on the
same test windows.
"""

import json
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from pdf2lora.training.trainer import build_model, build_trainer

from benchmarks.table import machine
from pdf2lora.documents.records import read_documents
from pdf2lora.evaluation.intervals import perplexity
from pdf2lora.evaluation.metrics import token_counts
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.windows import text_windows
from pdf2lora.model.forward import build_forward
from pdf2lora.params import Params, read_params
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import Encoder

BASE, SPLITS = Path("models/base"), Path("data/split")
KERNELS = ("reference", "fused", "fp8")


def test_perplexity(model: Any, params: Params, encoder: Encoder) -> float:
    texts = [document.text for document in read_documents(SPLITS / "test.jsonl")]
    sizes, looks = text_windows(texts, encoder, params)
    forward = build_forward(model, "reference")
    nats = nats_per_document(
        forward, looks, num_documents=len(sizes), per_device_batch=32, processes=Processes.alone(forward.head.device)
    )
    return perplexity(nats, token_counts(sizes)).value


def trained_perplexity(params: Params, kernels: str, seed: int, encoder: Encoder) -> float:
    train = params.train.model_copy(update={"seed": seed})
    texts = [document.text for document in read_documents(SPLITS / "train.jsonl")]
    model = build_model(BASE, params.quantization, params.lora, params.compute, seed=train.seed)
    trainer = build_trainer(
        model,
        encoder.sequences(texts, seq_length=params.compute.seq_length),
        train=train,
        kernels=kernels,
        gradient_checkpointing="none",
        per_device_batch=int(train.effective_batch),
        gradient_accumulation_steps=1,
        checkpoints=Path(mkdtemp()),
    )
    trainer.train()
    return test_perplexity(model, params, encoder)


def main() -> None:
    file, *seeds = sys.argv[1:]
    params, encoder = read_params(), Encoder.load(BASE)
    model = build_model(BASE, params.quantization, params.lora, params.compute, seed=params.train.seed)
    parameters = json.loads(Path("metrics/convert.json").read_text())["num_parameters"]
    results: dict[str, Any] = {
        "machine": machine(),
        "parameters": parameters,
        "base_perplexity": round(test_perplexity(model, params, encoder), 4),
    }
    for kernels in KERNELS:
        perplexities = [trained_perplexity(params, kernels, int(seed), encoder) for seed in seeds or (0, 1, 2)]
        results[kernels] = {
            "perplexity": [round(perplexity, 4) for perplexity in perplexities],
            "mean": round(float(np.mean(perplexities)), 4),
            "standard_deviation": round(float(np.std(perplexities, ddof=1)), 4),
        }
        print(kernels, results[kernels], flush=True)
        Path(file).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
