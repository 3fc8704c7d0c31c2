"""Measures the seconds to score windows with the base model and with the adapted model, as evaluate does.

    python -m benchmarks.evaluation <windows> <batch> [<kernels> ...]

The windows have random tokens, and every token is scored. The model is models/base with new LoRA matrices.
"""

import json
import sys
import time
from contextlib import nullcontext

import numpy as np

from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.model.device import device
from pdf2lora.model.forward import build_forward
from pdf2lora.params import read_params
from pdf2lora.paths import BASE
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import windows
from pdf2lora.training.job import build_model


def main() -> None:
    num_windows, batch, *kernels = sys.argv[1:]
    params = read_params()
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    seq_length = params.compute.seq_length
    rows = np.random.default_rng(0).integers(0, vocabulary, size=(int(num_windows), seq_length), dtype=np.int32)
    alone = Processes.alone(device())
    random_windows = windows(rows, bos=0, seq_length=seq_length, stride=seq_length)
    started = time.perf_counter()
    model = build_model(BASE, params)
    print(f"load: {time.perf_counter() - started:.1f} s")
    for name in kernels or ["fused"]:
        forward = build_forward(model, name)
        started = time.perf_counter()
        for adapter in (nullcontext(), model.disable_adapter()):
            with adapter:
                nats_per_document(
                    forward, random_windows, num_documents=len(rows), per_device_batch=int(batch), processes=alone
                )
        print(f"{name}: {num_windows} windows, adapted and base: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
