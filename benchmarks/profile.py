"""Profiles a training step: milliseconds of each GPU kernel and of idle time.

    python -m benchmarks.profile <system> <gradient_checkpointing>:<batch>

benchmarks.step lists the systems. One line sums all matrix products, including LoRA's small ones.
"""

import re
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import STEPS_TO_WARM_UP, cases
from pdf2lora.params import read_params

STEPS = 3
LINES = 24
MATRIX_PRODUCT = re.compile("nvjet|gemm|cutlass|xmma", re.IGNORECASE)


class Profiler:
    """Records STEPS steps after those that warm up."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CUDA])
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def after_step(self, step: int) -> None:
        if step == STEPS_TO_WARM_UP:
            torch.cuda.synchronize()
            self.profile.start()
            self.start.record()
        if step == STEPS_TO_WARM_UP + STEPS:
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
    for case in cases(read_params()):
        profiler = Profiler()
        case.run(profiler.after_step)
        step_ms, kernels = profiler.milliseconds()
        idle_ms = step_ms - kernels.total()
        print(f"{case.gradient_checkpointing}:{case.batch}: {step_ms:.1f} ms per step, {idle_ms:.1f} ms of it idle")
        for name, milliseconds in kernels.most_common(LINES):
            print(f"{milliseconds:9.2f} ms  {name}")


if __name__ == "__main__":
    main()
