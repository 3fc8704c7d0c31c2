"""Tokens/s and peak memory of a training step of an 8B or 70B Llama, its layers in GPU memory or in host memory.

    python -m benchmarks.large <3b|8b|70b> <kernels> <placement> <gradient_checkpointing>:<batch>[:<seq_length>] [...]

The weights are random, and all layers share the packed weights of one layer: time and GPU memory of streamed layers do
not depend on it, but `gpu` reports too little memory (it prints the sum that own layers would need as resident_gib).
LoRA, optimizer and loss are those of params.yaml. Prints one line of JSON for each case.
"""

import gc
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from pdf2lora.model.device import device
from pdf2lora.model.layer_stream import LayerStream
from pdf2lora.model.loading import add_lora
from pdf2lora.model.packed_base import replace_linears
from pdf2lora.model.packed_layers import LayerLayout
from pdf2lora.params import Params, read_params
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.monitor import device_name
from pdf2lora.runtime.pinned_memory import shared_pinned_memory
from pdf2lora.tokens import Sequences
from pdf2lora.training.loop import BatchPlan, Learner

SHAPES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
    "70b": (8192, 28672, 80, 64, 8),
}
VOCABULARY = 128_256
STANDARD_DEVIATION = 0.02
STEPS, STEPS_TO_WARM_UP = 4, 1
GIB = 2**30


def main() -> None:
    shape, kernels, placement, *cases = sys.argv[1:]
    params = read_params()
    model, resident_gib = build(shape, placement, params)
    for case in cases:
        mode, batch, *seq_length = case.split(":")
        result: dict[str, Any] = {
            "shape": shape,
            "kernels": kernels,
            "placement": placement,
            "gradient_checkpointing": mode,
        }
        result |= {"device": device_name(), "resident_gib": round(resident_gib, 2)}
        result |= measure(model, params, kernels, mode, int(batch), int(seq_length[0]) if seq_length else 512)
        print(json.dumps(result), flush=True)


def build(shape: str, placement: str, params: Params) -> tuple[Any, float]:
    """A PeftModel, and the GiB that all its packed layers would need."""
    hidden, intermediate, num_layers, num_heads, num_keys = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_keys,
        vocab_size=VOCABULARY,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=shape == "3b",
        use_cache=False,
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        for layer in model.model.layers:
            replace_linears(layer, params.quantization, torch.bfloat16)
    torch.manual_seed(0)
    layout = LayerLayout(model.model.layers[0], params.quantization)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device())
    layout.pack([random(*size) for size in layout.shapes], buffer)
    layouts = [layout] * num_layers
    if placement == "gpu":
        for layer in model.model.layers:
            layout.attach(layer, layout.views(buffer), torch.bfloat16)
    else:
        processes = Processes.alone(device())
        memory = shared_pinned_memory(layout.num_bytes, lambda to: to.copy_(buffer.cpu()), processes, "benchmark")
        del buffer
        model.layer_stream = LayerStream(model.model.layers, layouts, [memory] * num_layers, device(), torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, attribute = name.rpartition(".")
            value = random(*parameter.shape) if parameter.dim() == 2 else torch.ones(parameter.shape, device=device())
            setattr(model.get_submodule(module), attribute, nn.Parameter(value.bfloat16(), requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb.to(device())
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    return add_lora(model, params.lora), num_layers * layout.num_bytes / GIB


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16) * STANDARD_DEVIATION


def measure(
    model: nn.Module, params: Params, kernels: str, mode: str, batch: int, seq_length: int
) -> dict[str, object]:
    """Of STEPS optimizer steps; the first ones are not timed."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 256, size=batch * seq_length + 1, dtype=np.int32)
    sequences = Sequences(tokens, seq_length)
    result: dict[str, Any] = {"batch": batch, "seq_length": seq_length}
    try:
        learner = Learner(
            model,
            train=params.train,
            compute=params.compute.model_copy(update={"seq_length": seq_length}),
            plan=BatchPlan(kernels, mode, batch, batch),
            num_steps=STEPS,
            processes=Processes(),
        )
        for number in range(STEPS):
            if number == STEPS_TO_WARM_UP:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            learner.step(sequences, np.arange(batch), number)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return result | {"out_of_memory": True}
    seconds = (time.perf_counter() - begin) / (STEPS - STEPS_TO_WARM_UP)
    return result | {
        "tokens_per_s": round(batch * seq_length / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "loss": round(learner.parameters.loss.item(), 3),
    }


if __name__ == "__main__":
    main()
