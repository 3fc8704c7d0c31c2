"""Dropout of LoRA's input. Its mask is a function of a counter, not of a random generator's state.

The mask of an element depends on the seed, the LoRA layer, the token's index in the step and the feature. So
- N processes draw the masks that one process draws,
- activation checkpointing draws the same mask twice,
- a captured CUDA graph draws a new mask in each replay: seed and first sequence are in device memory.

The random function is Philox4x32-7 (Salmon et al. 2011, Parallel Random Numbers; seven rounds pass BigCrush). The key
is the seed. The counter is (token, lower 32 bits; token, upper 32 bits; group of eight features; LoRA layer). The 128
random bits are 16 bits for each of the eight features. kernels/dropout.py computes the same function on a GPU.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FEATURES_PER_CALL = 8  # features that share one call of Philox
NUM_THRESHOLDS = 1 << 16
PHILOX_ROUNDS = 7
CALLS_PER_BLOCK = 1 << 14  # on a CPU; so the temporary arrays of a block fit into the processor's cache
LOW_32_BITS, UPPER = np.uint64(0xFFFFFFFF), np.uint64(32)
Words = NDArray[np.uint64] | np.uint64


@dataclass(frozen=True)
class DropoutRate:
    """Probability p, rounded to a multiple of 1 / 65536. The scale belongs to the rounded probability."""

    p: float

    @property
    def threshold(self) -> int:
        """Dropout removes a feature if its 16 random bits are below this number."""
        return min(round(self.p * NUM_THRESHOLDS), NUM_THRESHOLDS - 1)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.threshold / NUM_THRESHOLDS)


class DropoutState:
    """Seed and first sequence of the next micro-batch, in device memory. All LoRA layers of a model share them.

    tensor: (2,), int64, [seed, first_sequence].
    seq_length: of the micro-batch, for layers whose input has no dimension of sequences.
    """

    def __init__(self, device: torch.device):
        self.tensor = torch.zeros(2, dtype=torch.int64, device=device)
        self.is_set = False
        self.seq_length = 1

    def set(self, seed: int, first_sequence: int) -> None:
        """Call it before each micro-batch, never between its forward and backward pass. Does not wait for the GPU.

        seed: a new one for each optimizer step, 0 <= seed < 2**63.
        first_sequence: position of the micro-batch's first sequence in the step.
        """
        self.tensor[0].fill_(seed)
        self.tensor[1].fill_(first_sequence)
        self.is_set = True

    def require_set(self) -> None:
        """Raises RuntimeError in a training step without set(), which would draw the same masks in each step."""
        if not self.is_set:
            raise RuntimeError("training with dropout needs a seed: call forward.set_dropout before each micro-batch")


class CounterDropout(nn.Module):
    """Takes the place of nn.Dropout in one LoRA layer of PEFT."""

    def __init__(self, p: float, layer_index: int, state: DropoutState):
        super().__init__()
        self.p = p
        self.layer_index = layer_index
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq_length, features), or (batch * seq_length, features) as in OPT; same shape and dtype."""
        rate = DropoutRate(self.p)
        if not self.training or rate.threshold == 0:
            return x
        self.state.require_set()
        seq_length = x.shape[1] if x.dim() == 3 else self.state.seq_length
        mask = keep_mask(self.state.tensor, self.layer_index, x.numel() // x.shape[-1], seq_length, x.shape[-1], rate)
        return x * mask.view(x.shape) * rate.scale


def install_counter_dropout(model: nn.Module) -> None:
    """Replaces the nn.Dropout of each LoRA layer of a PeftModel. LoRA layers are numbered in the order of modules()."""
    state = None
    for index, module in enumerate(lora_layers(model)):
        dropout = module.lora_dropout["default"]
        if isinstance(dropout, nn.Dropout):
            state = state or DropoutState(module.lora_A["default"].weight.device)
            module.lora_dropout["default"] = CounterDropout(dropout.p, index, state).train(dropout.training)


def dropout_state(model: nn.Module) -> DropoutState | None:
    """The state that the LoRA layers of the model share. None: the model has no dropout."""
    return next((module.state for module in model.modules() if isinstance(module, CounterDropout)), None)


def lora_layers(model: nn.Module) -> Iterable[Any]:
    """PEFT's LoRA layers, in the order of modules()."""
    return (module for module in model.modules() if "default" in getattr(module, "lora_dropout", {}))


def keep_mask(
    state: Tensor, layer_index: int, tokens: int, seq_length: int, num_features: int, rate: DropoutRate
) -> Tensor:
    """The features that dropout keeps, (tokens, num_features), bool, on the device of `state`.

    Token t of the result is token first_sequence * seq_length + t of the step.
    """
    if state.is_cuda and importlib.util.find_spec("triton") is not None:
        from pdf2lora.model.kernels.dropout import keep_mask as on_gpu

        return on_gpu(state, layer_index, tokens, seq_length, num_features, rate.threshold)
    seed, first_sequence = state.tolist()
    num_groups = -(-num_features // FEATURES_PER_CALL)
    group = np.arange(num_groups, dtype=np.uint64)[None, :]
    block = max(1, CALLS_PER_BLOCK // num_groups)
    mask = np.empty((tokens, num_features), dtype=np.bool_)
    bits = np.empty((min(block, tokens), num_groups, 4), dtype=np.uint32)
    for start in range(0, tokens, block):
        part = mask[start : start + block]
        token = np.arange(start, start + len(part), dtype=np.uint64)[:, None] + np.uint64(first_sequence * seq_length)
        words = philox(token & LOW_32_BITS, token >> UPPER, group, np.uint64(layer_index), seed)
        for number, word in enumerate(words):
            bits[: len(part), :, number] = word
        draws = bits[: len(part)].reshape(len(part), -1).view(np.uint16)
        np.greater_equal(draws[:, :num_features], rate.threshold, out=part)
    return torch.from_numpy(mask).to(state.device)


def philox(c0: Words, c1: Words, c2: Words, c3: Words, key: int, rounds: int = PHILOX_ROUNDS) -> tuple[Words, ...]:
    """Philox4x32: 128 random bits for each counter (c0, c1, c2, c3), as four arrays of 32-bit words in uint64."""
    key_0, key_1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(rounds):
        product_0, product_2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = (product_2 >> UPPER) ^ c1 ^ np.uint64(key_0)
        c2 = (product_0 >> UPPER) ^ c3 ^ np.uint64(key_1)
        c1, c3 = product_2 & LOW_32_BITS, product_0 & LOW_32_BITS
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
