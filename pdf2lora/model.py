"""The quantized base, LoRA on top, the attention backend: the only file that knows QLoRA (Dettmers et al. 2023)."""

import importlib.util
import logging
import warnings
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.params import Lora, Quantization, Train

log = logging.getLogger(__name__)

transformers.utils.logging.disable_progress_bar()
# transformers 5.23 renamed gradient_checkpointing_enable, 5.17 has no other name.
warnings.filterwarnings("ignore", "`(gradient|is_gradient)_checkpointing", FutureWarning)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def limit_gpu_memory(gib: float) -> None:
    """The allocator of this process reserves no more than this: a large GPU stands for a small one."""
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1] / 2**30
        torch.cuda.set_per_process_memory_fraction(min(gib / total, 1.0))


def compute_dtype(train: Train) -> torch.dtype:
    """What products are computed in: bfloat16 on a GPU that has it, float32 on a CPU.

    Most CPUs have no bfloat16 arithmetic and emulate it: on two cores with AVX2 alone a training step of the demo
    took 38 s in bfloat16 and 2.6 s in float32.
    """
    if train.compute_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if train.compute_dtype == "bfloat16" else torch.float32


def attention(train: Train) -> str:
    """flash_attention_2 where it is installed and usable, else sdpa; says which one and why.

    Raises:
        InputError: flash_attention_2 was asked for and cannot run.
    """
    if not torch.cuda.is_available():
        obstacle = "there is no CUDA GPU"
    elif importlib.util.find_spec("flash_attn") is None:
        obstacle = "the package flash-attn is not installed"
    elif compute_dtype(train) != torch.bfloat16:
        obstacle = "it computes in half precision only"
    elif torch.cuda.get_device_capability() < (8, 0):
        obstacle = "it needs a GPU of compute capability 8.0 or more"
    else:
        obstacle = ""
    if train.attention == "flash_attention_2" and obstacle:
        raise InputError(
            f"train.attention: 'flash_attention_2' cannot run here: {obstacle}; choose 'auto' or 'sdpa' "
            "(or see requirements-gpu.txt)"
        )
    runs = "sdpa" if obstacle or train.attention == "sdpa" else "flash_attention_2"
    why = f" ({obstacle})" if obstacle and train.attention == "auto" else ""
    log.info("attention: %s asked for, %s runs%s", train.attention, runs, why)
    return runs


def load_base(base: Path, quantization: Quantization, train: Train) -> LlamaForCausalLM:
    """The frozen base model on the device, its linear layers in 4, 8 or 16 bits.

    Raises:
        InputError: bitsandbytes cannot quantize on this machine, or not this model.
    """
    dtype = compute_dtype(train)
    require_quantization(quantization.bits)
    model = LlamaForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": device()},
        attn_implementation=attention(train),
        quantization_config=_bitsandbytes(quantization, dtype),
        local_files_only=True,
    )
    in_4_bits = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    require_same_weights({module.in_features for module in in_4_bits}, quantization.bnb_4bit_quant_type, dtype)
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


def require_quantization(bits: int) -> None:
    """Quantizes a few numbers: what is built for this machine shows there and not in the middle of a model."""
    if bits == 16:
        return
    numbers = torch.ones(64, 64, device=device())
    try:
        if bits == 4:
            bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(numbers, quant_type="nf4"))
        else:
            bnb.functional.int8_vectorwise_quant(numbers.half())
    except Exception as error:
        raise InputError(
            f"quantization.bits: {bits} is not possible here: bitsandbytes {bnb.__version__} on {device().type} says "
            f"'{' '.join(str(error).split())[:200]}'; install a bitsandbytes built for this machine or choose 16"
        ) from error


def require_same_weights(widths: set[int], quant_type: str, dtype: torch.dtype) -> None:
    """Stores random weights in 4 bits, at each number of input features, and compares what bitsandbytes reads with
    the table of the data type times each block's largest.

    On CPUs with AVX512, bitsandbytes 0.50.2 starts every row at a new block. Blocks have 64 weights and run on from
    row to row, so where the input features are a multiple of 16 and not of 64 (the widths of its vector code), most
    rows get the scales of other blocks, and products and gradients were off by 16% to 48%, without a word.

    Raises:
        InputError: a weight is not the one that was stored.
    """
    if device().type != "cpu":
        return
    same_each_time = torch.Generator().manual_seed(0)  # the stage's own random stream must not move
    for width in sorted(widths):
        weights = torch.randn(32, width, generator=same_each_time).to(dtype)
        packed, state = bnb.functional.quantize_4bit(weights, quant_type=quant_type)
        read = bnb.functional.dequantize_4bit(packed, state)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
        scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
        stored = (state.code[codes] * scales).view_as(read)
        off = ((read - stored).abs().max() / stored.abs().max()).item()
        if not off < 0.01:  # or is no number
            raise InputError(
                f"quantization.bits: 4 is not possible here for the model's layers of {width} input features: "
                f"bitsandbytes {bnb.__version__} on this CPU must give back the weights that it stored, and is off by "
                f"{off:.0%} of the largest; choose 8 or 16, or run on a GPU"
            )


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
