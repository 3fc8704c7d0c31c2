"""Profiles a training step: milliseconds of each GPU kernel and of idle time.

    python -m benchmarks.profile <system> <gradient_checkpointing>:<batch>

benchmarks.step lists the systems. One line sums all matrix products, including LoRA's small ones.
"""

import re
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.step import STEPS_TO_WARM_UP, trainers
from pdf2lora.params import read_params

STEPS = 3
LINES = 24
MATRIX_PRODUCT = re.compile("nvjet|gemm|cutlass|xmma", re.IGNORECASE)


class Profiler(TrainerCallback):
    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CUDA])
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS_TO_WARM_UP:
            self.profile.start()
            self.start.record()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS_TO_WARM_UP + STEPS:
            self.end.record()
            torch.cuda.synchronize()
            self.profile.stop()

    def milliseconds(self) -> tuple[float, Counter[str]]:
        """Milliseconds of one step: in total, and by kernel."""
        kernels: Counter[str] = Counter()
        for event in self.profile.events():  # type: ignore[no-untyped-call]
            name = "matrix products" if MATRIX_PRODUCT.search(event.name) else event.name[:70]
            kernels[name] += event.device_time_total / 1000 / STEPS
        return self.start.elapsed_time(self.end) / STEPS, kernels


def main() -> None:
    params = read_params()
    for gradient_checkpointing, batch, trainer, _ in trainers(params):
        profiler = Profiler()
        trainer.add_callback(profiler)
        trainer.train()
        step_ms, kernels = profiler.milliseconds()
        idle_ms = step_ms - kernels.total()
        print(f"{gradient_checkpointing}:{batch}: {step_ms:.1f} ms per step, {idle_ms:.1f} ms of it idle")
        for name, milliseconds in kernels.most_common(LINES):
            print(f"{milliseconds:9.2f} ms  {name}")


if __name__ == "__main__":
    main()
