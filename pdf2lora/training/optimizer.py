"""All LoRA matrices as one flat parameter, its gradient as one flat buffer, and the optimizers of train.optim.

With one parameter, the optimizer is launched once per step, not once for each of the 224 LoRA matrices of a 3B Llama.
AdamW updates each number alone, so the result does not change; only the blocks of the 8-bit moments (Dettmers et al.
2022) have other borders. With one gradient buffer, a step needs one all-reduce.
"""

from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from pdf2lora.params import Train

NUM_SUMS = 2  # numbers that are summed with the gradient: the loss, and the processes that received a stop signal
MOMENTS = {"state1", "state2"}  # bitsandbytes' names of AdamW's moments


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
    bits = 32 if train.optim.endswith("32bit") else 8
    return AsynchronousAdamW([parameter], optim_bits=bits, is_paged=train.optim.startswith("paged"), **settings)


class AsynchronousAdamW(bnb.optim.AdamW):  # type: ignore[misc]  # bitsandbytes has no types
    """bitsandbytes' AdamW. Its step() does not wait for the GPU, so Python can start the next step meanwhile.

    Paged moments are in memory that host and GPU share. Wait for the GPU before the host reads them (state_dict).
    """

    initialized: bool

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, group_index, index)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Loads a state. Paged moments stay paged: bitsandbytes alone would load them into GPU memory."""
        super().load_state_dict(state_dict, move_to_device)
        for parameter, state in self.state.items():
            for name in MOMENTS & state.keys():
                buffer = self.get_state_buffer(parameter, dtype=state[name].dtype)
                if getattr(buffer, "is_paged", False):
                    torch.cuda.synchronize()  # until the GPU has filled the buffer with zeros
                    state[name] = buffer.copy_(state[name])
