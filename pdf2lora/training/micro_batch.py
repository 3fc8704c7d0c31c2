"""Forward and backward pass of one micro-batch: operation by operation, or as one captured CUDA graph.

Python limits a small micro-batch: on one H200 it took 104 to 164 ms to launch the kernels of a 3B Llama's step, at any
batch size. A graph is captured once, and one launch replays it. All values that change between replays are in device
memory: tokens, targets, the scale of the loss, and the seed and first sequence of the dropout masks.
"""

import torch
from torch import Tensor

from pdf2lora.model.cuda_graph import capture
from pdf2lora.model.device import NO_CUDA_GPU
from pdf2lora.model.forward import Forward
from pdf2lora.model.loss import linear_cross_entropy
from pdf2lora.tokens import IGNORED
from pdf2lora.training.optimizer import FlatParameters


class MicroBatch:
    """Adds a micro-batch's gradients and loss to the flat buffer.

    size: sequences of a full micro-batch. A graph always computes `size` sequences; unused ones have no targets.
    graph_obstacle: the reason why no graph is captured. If it is empty, the first call captures a graph.
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

    def __call__(self, inputs: Tensor, targets: Tensor, *, scale: float, seed: int, first_sequence: int) -> None:
        """inputs, targets: (sequences, seq_length), int64, on the CPU; at most `size` sequences.

        scale: the loss is the sum of the targets' nats times this number.
        seed, first_sequence: select the dropout masks; first_sequence is the first sequence's position in the step.
        """
        self.forward.set_dropout(seed, first_sequence)
        num_sequences = len(inputs)
        self._send(inputs, self.inputs[:num_sequences])
        self._send(targets, self.targets[:num_sequences])
        self.scale.fill_(scale)
        if self.graph_obstacle:
            self._forward_backward(self.inputs[:num_sequences], self.targets[:num_sequences], self.scale)
            return
        self.targets[num_sequences:].fill_(IGNORED)
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _send(self, tokens: Tensor, to: Tensor) -> None:
        """Copies to the device. From pinned memory: only then the copy waits for no earlier work of the GPU."""
        to.copy_(tokens.pin_memory() if to.is_cuda else tokens, non_blocking=True)

    def _forward_backward(self, inputs: Tensor, targets: Tensor, scale: Tensor) -> None:
        hidden = self.forward(inputs)
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.forward.head, targets.flatten()) * scale
        del hidden
        loss.backward()
        self.parameters.loss.add_(loss.detach())

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Captures forward and backward pass over the static tensors. Does not change the content of the buffer."""
        content = self.parameters.buffer.clone()
        graph = capture(lambda: self._forward_backward(self.inputs, self.targets, self.scale), self.forward.model)
        self.parameters.buffer.copy_(content)
        return graph


def graph_obstacle(kernels: str, gradient_checkpointing: str) -> str:
    """The reason why the training step cannot be a CUDA graph, or an empty string."""
    if not torch.cuda.is_available():
        return NO_CUDA_GPU
    if kernels == "reference":
        return "the reference kernels synchronize with the CPU"
    if gradient_checkpointing == "offload":
        return "layer inputs move to host memory"
    return ""
