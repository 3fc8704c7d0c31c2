"""All LoRA matrices as one flat parameter, its gradient as one flat buffer, and the optimizers of train.optim.

With one parameter, the optimizer is launched once per step. bitsandbytes' optimizers wait for the GPU after each
parameter: the 224 LoRA matrices of a 3B Llama cost 25 ms per step. AdamW updates each number alone, so the result does
not change; only the blocks of the 8-bit moments (Dettmers et al. 2022) have other borders. With one gradient buffer, a
step needs one all-reduce.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pdf2lora.params import Train

NUM_SUMS = 2  # numbers that are summed with the gradient: the loss, and the processes that received a stop signal


class FlatParameters:
    """`parameter` holds the numbers of all `parameters`, and `buffer` their gradients and the step's sums.

    The given parameters and their gradients become views: backward passes add to `buffer` directly.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters = list(parameters)
        numbers = torch.cat([parameter.detach().float().flatten() for parameter in self.parameters])
        self.parameter = torch.nn.Parameter(numbers)
        self.buffer = torch.zeros(len(numbers) + NUM_SUMS, device=numbers.device)
        self.gradient, sums = self.buffer.split([len(numbers), NUM_SUMS])
        self.loss: Tensor = sums[0]
        """The step's loss, a scalar."""
        self.stop_requests: Tensor = sums[1]
        """Number of processes that received a stop signal, a scalar."""
        self.parameter.grad = self.gradient
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, values, gradient in zip(
            self.parameters, numbers.split(sizes), self.gradient.split(sizes), strict=True
        ):
            parameter.data = values.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)


def build_optimizer(parameter: torch.nn.Parameter, train: Train) -> torch.optim.Optimizer:
    """The optimizer that train.optim names, with the betas and epsilon of the Hugging Face Trainer."""
    settings: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optim.startswith("adamw_torch"):
        return torch.optim.AdamW([parameter], fused=train.optim == "adamw_torch_fused", **settings)
    import bitsandbytes as bnb

    bits = 32 if train.optim.endswith("32bit") else 8
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW(
        [parameter], optim_bits=bits, is_paged=train.optim.startswith("paged"), **settings
    )
    return optimizer
