"""Measures the test perplexity after training with each value of compute.kernels, for several seeds.

    python -m benchmarks.quality <results.json> [<seed> ...]

Trains on models/base and data/tokens as train does, with the settings of params.yaml except compute.kernels and
train.seed. train.effective_batch must be a number; a step is one micro-batch. The reference kernels score every adapter
in bfloat16 on the same test windows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import machine
from pdf2lora.evaluation.intervals import perplexity
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.model.forward import build_forward
from pdf2lora.model.kernel_choice import Kernels
from pdf2lora.params import Params, read_params
from pdf2lora.paths import BASE, TOKENS
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.files import write_json
from pdf2lora.token_files import TokenFile
from pdf2lora.training.data_order import DataOrder
from pdf2lora.training.job import build_model
from pdf2lora.training.loop import BatchPlan, Learner

KERNELS: tuple[Kernels, ...] = ("reference", "fused", "fp8")


def test_perplexity(model: Any, params: Params) -> float:
    tokens = TokenFile.open(TOKENS, "test")
    forward = build_forward(model, "reference")
    nats = nats_per_document(
        forward,
        tokens.windows(seq_length=params.compute.seq_length, stride=params.evaluate.stride),
        num_documents=len(tokens.bounds),
        per_device_batch=32,
        processes=Processes.alone(forward.head.device),
    )
    return perplexity(nats, np.diff(tokens.bounds).ravel()).value


def trained_perplexity(params: Params, kernels: Kernels, seed: int) -> float:
    params = params.model_copy(update={"train": params.train.model_copy(update={"seed": seed})})
    sequences = TokenFile.open(TOKENS, "train").sequences(params.compute.seq_length)
    batch = int(params.train.effective_batch)
    order = DataOrder(len(sequences), batch, params.train.num_train_epochs, seed)
    model = build_model(BASE, params)
    learner = Learner(
        model,
        train=params.train,
        compute=params.compute,
        plan=BatchPlan(kernels, "none", batch, batch),
        num_steps=order.num_steps,
        processes=Processes(),
    )
    for step in range(order.num_steps):
        learner.step(sequences, order.indices(step), step)
    return test_perplexity(model, params)


def main() -> None:
    file, *seeds = sys.argv[1:]
    params = read_params()
    model = build_model(BASE, params)
    parameters = json.loads(Path("metrics/convert.json").read_text())["num_parameters"]
    results: dict[str, Any] = {
        "machine": machine(),
        "parameters": parameters,
        "base_perplexity": round(test_perplexity(model, params), 4),
    }
    for kernels in KERNELS:
        perplexities = [trained_perplexity(params, kernels, int(seed)) for seed in seeds or (0, 1, 2)]
        results[kernels] = {
            "perplexity": [round(perplexity, 4) for perplexity in perplexities],
            "mean": round(float(np.mean(perplexities)), 4),
            "standard_deviation": round(float(np.std(perplexities, ddof=1)), 4),
        }
        print(kernels, results[kernels], flush=True)
        write_json(Path(file), results)


if __name__ == "__main__":
    main()
