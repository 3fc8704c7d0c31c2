"""The quantized base model with LoRA (QLoRA, Dettmers et al. 2023)."""

import warnings
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from pdf2lora.model.capabilities import attention, check_4bit_round_trip, compute_dtype, device, require_quantization
from pdf2lora.params import Compute, Lora, Quantization

transformers.utils.logging.disable_progress_bar()


# transformers 5.23 renamed gradient_checkpointing_enable, 5.17 has no other name.
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
        attn_implementation=attention(compute),
        quantization_config=_bitsandbytes(quantization, dtype),
        local_files_only=True,
    )
    in_4_bits = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    check_4bit_round_trip({module.in_features for module in in_4_bits}, quantization.bnb_4bit_quant_type, dtype)
    for module in in_4_bits:
        # On CPUs with AVX512-BF16 the first forward in eval mode would repack the weights, and gradients through them
        # would be wrong from then on (bitsandbytes 0.50).
        module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    match quantization.bits:
        case 4:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
                bnb_4bit_compute_dtype=dtype,
            )
        case 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        case _:
            return None


def add_lora(model: LlamaForCausalLM, lora: Lora) -> PeftModel:
    """New LoRA matrices in float32 (Hu et al. 2021) on the frozen base; B starts at zero.

    PEFT's prepare_model_for_kbit_training is not used: it also casts embeddings, head and norms to float32.
    """
    settings = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="models/base", **lora.model_dump())
    peft_model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    # PEFT keeps a set and would write it to adapter_config.json in another order in every process.
    peft_model.peft_config["default"].target_modules = sorted(lora.target_modules)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def load_adapter(model: LlamaForCausalLM, adapter: Path) -> PeftModel:
    """The base with a trained adapter; `with model.disable_adapter()` gives the base alone."""
    return PeftModel.from_pretrained(model, adapter, local_files_only=True)
