"""Loads the quantized base model and adds LoRA matrices to it (QLoRA, Dettmers et al. 2023)."""

import logging
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from pdf2lora.errors import InputError
from pdf2lora.families import is_target
from pdf2lora.model.attention_choice import choose_attention
from pdf2lora.model.device import compute_dtype, device
from pdf2lora.model.dropout import install_counter_dropout
from pdf2lora.model.head import check_causal_lm
from pdf2lora.model.layer_stream import layer_stream
from pdf2lora.model.packed_base import choose_placement, load_packed_base, packing_obstacle
from pdf2lora.model.quantization import bitsandbytes_config, check_4bit_round_trip, require_quantization
from pdf2lora.params import ALL_LINEAR, Compute, Lora, Placement, Quantization
from pdf2lora.runtime.distributed import Processes

transformers.utils.logging.disable_progress_bar()

# transformers 5.23 renamed gradient_checkpointing_enable. 5.17 does not know the new name.
warnings.filterwarnings("ignore", "`(gradient|is_gradient)_checkpointing", FutureWarning)
# With 8 bits, bitsandbytes writes a line about its input's dtype in each forward pass of each layer.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def read_config(base: Path) -> PreTrainedConfig:
    """Reads the model's config.json with transformers. Runs no code from the model's repository.

    Raises InputError if transformers does not know the architecture.
    """
    try:
        return AutoConfig.from_pretrained(base, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{base}/config.json: transformers cannot read it: {text}. Use another base model.") from error


def load_base(
    base: Path,
    quantization: Quantization,
    compute: Compute,
    device_map: dict[str, torch.device | str] | None = None,
    *,
    placement: Placement | None = None,
    processes: Processes | None = None,
) -> PreTrainedModel:
    """The frozen base model on the device, its linear layers in 4, 8 or 16 bits.

    device_map: the device of each module; None puts the whole model on the device of this process.
    placement: of the decoder layers; None: the setting quantization.placement decides.
    processes: all processes of the job; None: this process does not wait for others.

    Raises:
        InputError: bitsandbytes cannot quantize this model on this machine; the model is not a decoder-only causal
            language model whose loss loss.py computes; or memory or disk are too small for the packed layers.
    """
    dtype = compute_dtype(compute)
    require_quantization(quantization.bits)
    config = read_config(base)
    attention = choose_attention(compute, _model_class(config))
    quantization_config = _quantization_config(config, quantization, bitsandbytes_config(quantization, dtype))
    if placement is None:
        placement = choose_placement(base, config, quantization, dtype)
        if processes is not None and "host" in processes.gather(placement):  # they share the host's memory
            placement = "host"
    packs = torch.cuda.is_available() and device_map is None and not packing_obstacle(config, quantization)
    if packs or placement == "host":
        processes = processes or Processes.alone(device())
        model = load_packed_base(base, config, quantization, dtype, attention, placement, processes)
    else:
        model = _load_with_transformers(
            base,
            config=config,
            dtype=dtype,
            device_map=device_map or {"": device()},
            attn_implementation=attention,
            quantization_config=quantization_config,
        )
    layers_4bit = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    check_4bit_round_trip({layer.in_features for layer in layers_4bit}, quantization.bnb_4bit_quant_type, dtype)
    for layer in layers_4bit:
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks weights in the first forward pass in eval mode. Gradients
        # through repacked weights are wrong.
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
    model.requires_grad_(False)
    model.config.use_cache = False
    _disable_dropout(model)
    check_causal_lm(model)
    return model


def _load_with_transformers(base: Path, **settings: Any) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(base, local_files_only=True, **settings)
    except (ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{base}: transformers cannot load it as a causal language model: {text}.") from error


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of the causal language model.

    Raises InputError if the architecture is not a causal language model.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"models/base has the architecture {config.model_type!r}, which is not a causal language model. "
            "Use another base model."
        )
    model_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class


def _disable_dropout(model: PreTrainedModel) -> None:
    """Turns off the base model's own dropout, as in GPT-2: its masks would depend on the number of processes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(module, name, 0.0)


def _quantization_config(
    config: PreTrainedConfig, quantization: Quantization, ours: BitsAndBytesConfig | None
) -> BitsAndBytesConfig | None:
    """Returns `ours`, or None if the source model is stored in 4 bits: transformers then reads the model's settings.

    convert refuses all other quantized source models.

    Raises InputError if the source model is stored in 4 bits, and quantization.bits is another number.
    """
    if getattr(config, "quantization_config", None) is None:
        return ours
    if quantization.bits != 4:
        raise InputError(
            f"quantization.bits is {quantization.bits}; the source model is quantized to 4 bits. Use 4 or the "
            "unquantized model."
        )
    return None


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Adds new LoRA matrices in float32 (Hu et al. 2021) to the frozen base model. B is zero.

    If lora.init_lora_weights needs the base's weights, initialization.initialize() replaces the matrices.

    Does not call PEFT's prepare_model_for_kbit_training, which casts embeddings, head and norms to float32.

    Raises InputError if a name in lora.target_modules is not a linear layer of the model, or PEFT refuses it; or for
    DoRA with layers in host memory, or with 8 bits on a CPU.
    """
    if lora.use_dora:
        _check_dora(model)
    targets = target_modules(model, lora)
    settings = lora.model_dump() | {"target_modules": targets}
    if lora.reads_weights:
        settings["init_lora_weights"] = True
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="models/base", **settings)
    try:
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:  # all-linear has a layer that PEFT refuses, such as Mamba's out_proj
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"lora.target_modules: PEFT cannot add LoRA to this model: {text}. Name other layers."
        ) from error
    # PEFT keeps a set, whose order differs in every process, so adapter_config.json would differ too.
    peft_model.peft_config["default"].target_modules = targets
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    install_counter_dropout(peft_model)
    return peft_model


def _check_dora(model: PreTrainedModel) -> None:
    """PEFT reads all weights to compute their norms, the initial magnitudes of DoRA."""
    if layer_stream(model) is not None:
        raise InputError(
            "lora.use_dora is true, which needs the layers in GPU memory (quantization.placement: gpu). Use false."
        )
    is_8bit = any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules())
    if is_8bit and not torch.cuda.is_available():
        raise InputError(
            "lora.use_dora is true and quantization.bits is 8: PEFT cannot read 8-bit weights on a CPU. Use 4 or 16 "
            "bits, or use_dora false."
        )


def target_modules(model: PreTrainedModel, lora: Lora) -> list[str]:
    """lora.target_modules, sorted. all-linear: the names of all linear layers except the head.

    Raises InputError if a name is not a linear layer of the model.
    """
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if lora.target_modules == ALL_LINEAR:
        return names
    for target in lora.target_modules:
        if not any(is_target(name, target) for name in linear):
            raise InputError(
                f"lora.target_modules has {target!r}; the model has no linear layer of that name. Use "
                f"{', '.join(names)} or all-linear."
            )
    return sorted(lora.target_modules)


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base model with a trained adapter. `with model.disable_adapter()` turns the adapter off."""
    return PeftModel.from_pretrained(model, adapter, local_files_only=True)
