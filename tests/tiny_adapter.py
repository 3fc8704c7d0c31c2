"""A LoRA adapter for the tiny Llama, as if it had been trained: no matrix is zero."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import write_tiny_llama
from transformers import LlamaForCausalLM


def write_tiny_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **names))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def write_tiny_models(folder: Path) -> Path:
    """base and adapter, as in models/."""
    write_tiny_adapter(folder / "adapter", write_tiny_llama(folder / "base"))
    return folder
