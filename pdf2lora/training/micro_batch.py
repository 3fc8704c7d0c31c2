"""Forward and backward pass of one micro-batch: operation by operation, or as one captured CUDA graph.

A small micro-batch waits for Python: on one H200 the launches of a 3B Llama's step took 104 to 164 ms, whatever the
batch. A graph is captured once and replayed with one launch. Everything that changes from one replay to the next is in
device memory: tokens, targets, the scale of the loss, and the seed and place of the dropout masks.
"""

import gc

import torch
from torch import Tensor

from pdf2lora.model.device import NO_CUDA_GPU
from pdf2lora.model.forward import Forward
from pdf2lora.model.layer_stream import layer_stream
from pdf2lora.model.loss import linear_cross_entropy
from pdf2lora.tokens import IGNORED
from pdf2lora.training.optimizer import FlatParameters

WARM_UP_PASSES = 2  # compile kernels and create workspaces, which must not happen during the capture


class MicroBatch:
    """Adds a micro-batch's gradients and loss to the flat buffer.

    size: sequences of a full micro-batch. A graph always computes so many; rows that are missing have no targets.
    graph_obstacle: why no graph is captured; "" captures one at the first call.
    """

    def __init__(
        self, forward: Forward, parameters: FlatParameters, *, size: int, seq_length: int, graph_obstacle: str
    ):
        self.forward, self.parameters = forward, parameters
        self.graph_obstacle = graph_obstacle
        self.graph: torch.cuda.CUDAGraph | None = None
        device = forward.head.device
        self.inputs = torch.zeros(size, seq_length, dtype=torch.int64, device=device)
        self.targets = torch.full((size, seq_length), IGNORED, device=device)
        self.scale = torch.zeros((), device=device)

    def __call__(self, inputs: Tensor, targets: Tensor, *, scale: float, seed: int, first_row: int) -> None:
        """inputs, targets: (sequences, seq_length), int64, on the CPU; at most `size` sequences.

        scale: the loss is the sum of the targets' nats times this number.
        seed, first_row: of the dropout masks; first_row is the place of the first sequence in the optimizer step.
        """
        self.forward.set_dropout(seed, first_row)
        if self.graph_obstacle:
            device = self.inputs.device
            self._forward_backward(inputs.to(device), targets.to(device), torch.tensor(scale, device=device))
            return
        self.inputs[: len(inputs)].copy_(inputs, non_blocking=True)
        self.targets.fill_(IGNORED)
        self.targets[: len(targets)].copy_(targets, non_blocking=True)
        self.scale.fill_(scale)
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _forward_backward(self, inputs: Tensor, targets: Tensor, scale: Tensor) -> None:
        hidden = self.forward(inputs)
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.forward.head, targets.flatten()) * scale
        loss.backward()
        self.parameters.loss.add_(loss.detach())

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Captures the pass over the static tensors; the buffer keeps what it holds."""
        held = self.parameters.buffer.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._forward_backward(self.inputs, self.targets, self.scale)
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()
        torch.cuda.empty_cache()  # the warm-up's memory, since the graph's pool cannot use it
        graph = torch.cuda.CUDAGraph()
        copies = layer_stream(self.forward.model)
        with torch.cuda.graph(graph):
            try:
                self._forward_backward(self.inputs, self.targets, self.scale)
            finally:
                if copies is not None:  # after an out of memory, the end of the capture would hide it
                    copies.join()
        self.parameters.buffer.copy_(held)
        return graph


def graph_obstacle(kernels: str, gradient_checkpointing: str) -> str:
    """Why the training step cannot be a CUDA graph, in words; "" if it can."""
    if not torch.cuda.is_available():
        return NO_CUDA_GPU
    if kernels == "reference":
        return "the reference kernels synchronize with the CPU"
    if gradient_checkpointing == "offload":
        return "layer inputs move to host memory"
    return ""
