"""Causal attention by PyTorch's kernels, called without autograd: the decoder layer is one autograd function.

Hopper and later GPUs use cuDNN's kernels, other GPUs FlashAttention-2 (Dao 2023). Only FlashAttention-2 has a
deterministic mode. Both accept fewer key heads than query heads (Ainslie et al. 2023).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """The heads in a row of the product of q, k and v: queries, then keys, then values."""

    num_queries: int
    num_keys: int
    head_dim: int
    seq_length: int

    @property
    def width(self) -> int:
        return (self.num_queries + 2 * self.num_keys) * self.head_dim

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (batch, heads, seq_length, head_dim) of queries, keys and values in rows (tokens, width)."""
        heads = qkv.view(-1, self.seq_length, self.width // self.head_dim, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.num_queries, self.num_keys, self.num_keys], dim=1)
        return query, key, value

    def split_queries_and_keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for rows without values: (tokens, (num_queries + num_keys) * head_dim)."""
        num_heads = self.num_queries + self.num_keys
        heads = rows.view(-1, self.seq_length, num_heads, self.head_dim).transpose(1, 2)
        query, key = heads.split([self.num_queries, self.num_keys], dim=1)
        return query, key

    def rows(self, attended: Tensor) -> Tensor:
        """(batch, heads, seq_length, head_dim) -> (tokens, heads * head_dim)."""
        return attended.transpose(1, 2).reshape(-1, self.num_queries * self.head_dim)


class Call(NamedTuple):
    """Other values of the forward pass that the backward pass needs: small tensors, and values of other types."""

    by_cudnn: bool
    arguments: tuple[Any, ...]


class Attended(NamedTuple):
    """Attention's output, and the other values that its backward pass needs."""

    output: Tensor  # (batch, heads, seq_length, head_dim)
    logsumexp: Tensor  # of each query's scores, float32
    call: Call


def cudnn_is_better(head_dim: int) -> bool:
    """One H100, sequences of 512, heads of 128, both passes: cuDNN took 0.95 ms, FlashAttention-2 1.33 ms."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return hopper and head_dim <= 128 and not torch.are_deterministic_algorithms_enabled()


Parts = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, (batch, heads, seq_length, head_dim) each


def forward(parts: Parts, heads: Heads) -> Attended:
    """parts: after the rotary embedding."""
    operators = torch.ops.aten
    by_cudnn = cudnn_is_better(heads.head_dim)
    if by_cudnn:
        output, logsumexp, *arguments, _ = operators._scaled_dot_product_cudnn_attention(
            *parts, None, compute_log_sumexp=True, is_causal=True
        )
    else:
        output, logsumexp, *arguments, _ = operators._scaled_dot_product_flash_attention(*parts, is_causal=True)
    return Attended(output, logsumexp, Call(by_cudnn, tuple(arguments)))


def backward(grad: Tensor, parts: Parts, attended: Attended, heads: Heads) -> Parts:
    """Gradients of queries, keys and values, each (batch, heads, seq_length, head_dim).

    grad: gradient of the output's rows, (tokens, heads * head_dim).
    """
    start_q, start_k, max_q, max_k, seed, offset = attended.call.arguments
    by_head = grad.view(-1, heads.seq_length, heads.num_queries, heads.head_dim).transpose(1, 2)
    tensors = (by_head, *parts, attended.output, attended.logsumexp)
    lengths = (start_q, start_k, max_q, max_k, 0.0, True)  # no dropout, causal
    gradients: Parts
    if attended.call.by_cudnn:
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*tensors, seed, offset, None, *lengths)
    else:
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(*tensors, *lengths, seed, offset)
    return gradients
