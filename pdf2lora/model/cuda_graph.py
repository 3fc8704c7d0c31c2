"""Captures GPU work as a CUDA graph. Python launches each kernel once; one launch of the graph replays all of them."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from pdf2lora.model.layer_stream import layer_stream

WARM_UP_PASSES = 2  # they compile kernels and create workspaces, which a capture must not do


def capture(work: Callable[[], object], model: Any) -> torch.cuda.CUDAGraph:
    """Runs `work` WARM_UP_PASSES times, then captures it.

    work: reads and writes tensors that stay at the same address, and does not synchronize with the CPU.
    model: whose layers may come from host memory (layer_stream.py).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_PASSES):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()
    torch.cuda.empty_cache()  # the graph's memory pool cannot use the memory of the warm-up
    graph = torch.cuda.CUDAGraph()
    copies = layer_stream(model)
    with torch.cuda.graph(graph):
        try:
            work()
        finally:
            if copies is not None:  # without it, the end of the capture would hide an out-of-memory error
                copies.join()
    return graph
