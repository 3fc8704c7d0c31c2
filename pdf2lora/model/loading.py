"""Loads the quantized base model and adds LoRA matrices to it (QLoRA, Dettmers et al. 2023)."""

import warnings
from pathlib import Path

import bitsandbytes as bnb
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from pdf2lora.model.attention_choice import choose_attention
from pdf2lora.model.device import compute_dtype, device
from pdf2lora.model.dropout import install_counter_dropout
from pdf2lora.model.quantization import bitsandbytes_config, check_4bit_round_trip, require_quantization
from pdf2lora.params import Compute, Lora, Quantization

transformers.utils.logging.disable_progress_bar()

# transformers 5.23 renamed gradient_checkpointing_enable. 5.17 does not know the new name.
warnings.filterwarnings("ignore", "`(gradient|is_gradient)_checkpointing", FutureWarning)


def load_base(base: Path, quantization: Quantization, compute: Compute) -> LlamaForCausalLM:
    """The frozen base model on the device, its linear layers in 4, 8 or 16 bits.

    Raises:
        InputError: bitsandbytes cannot quantize on this machine, or not this model.
    """
    dtype = compute_dtype(compute)
    require_quantization(quantization.bits)
    model = LlamaForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": device()},
        attn_implementation=choose_attention(compute),
        quantization_config=bitsandbytes_config(quantization, dtype),
        local_files_only=True,
    )
    layers_4bit = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    check_4bit_round_trip({layer.in_features for layer in layers_4bit}, quantization.bnb_4bit_quant_type, dtype)
    for layer in layers_4bit:
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks weights in the first forward pass in eval mode. Gradients
        # through repacked weights are wrong.
        layer.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def add_lora(model: LlamaForCausalLM, lora: Lora) -> PeftModel:
    """Adds new LoRA matrices in float32 (Hu et al. 2021) to the frozen base model. B is zero.

    Does not call PEFT's prepare_model_for_kbit_training, which casts embeddings, head and norms to float32.
    """
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="models/base", **lora.model_dump())
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    # PEFT keeps a set, which has another order in every process: adapter_config.json would differ.
    peft_model.peft_config["default"].target_modules = sorted(lora.target_modules)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    install_counter_dropout(peft_model)
    return peft_model


def load_adapter(model: LlamaForCausalLM, adapter: Path) -> PeftModel:
    """The base model with a trained adapter. `with model.disable_adapter()` turns the adapter off."""
    return PeftModel.from_pretrained(model, adapter, local_files_only=True)
