"""Merges an adapter into its unquantized base model: base + scaling * B A, or DoRA's renormalized sum.

A merge into a 4-bit base is not possible, because it would round the sum to 4 bits again and lose much of the training.
The files of the base are copied. Then each adapted weight is overwritten in the copies, one at a time, with the same
shape, dtype and offset. So memory holds only one weight.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.free_space import require_disk_space
from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.weights.huggingface_files import is_quantized
from pdf2lora.weights.json_files import read_json
from pdf2lora.weights.safetensors_files import mapped_weights

Progress = Callable[[int], object]  # weights merged since the last call

PEFT_PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"  # of DoRA
TRANSPOSED_MODEL_TYPES = ("gpt2", "openai-gpt")  # the weights in their files are (in_features, out_features)


def merge(base: Path, adapter: Path, target: Path, progress: Progress = lambda num_weights: None) -> int:
    """Fills the empty folder `target` with the merged model and returns the number of changed weights.

    The manifest of the base is not copied, because the hashes differ.

    base: a Hugging Face folder of safetensors, unquantized; adapter: a PEFT folder of LoRA, rsLoRA or DoRA.

    Raises InputError if the base is quantized, the disk is too small, or the adapter fits another base.
    """
    config = read_json(base / "config.json")
    if is_quantized(config):
        raise InputError(f"{base}: the base model is stored in 4 bits. Train on the unquantized model to merge.")
    is_transposed = config.get("model_type") in TRANSPOSED_MODEL_TYPES
    settings = LoraConfig.from_pretrained(str(adapter))
    settings.fan_in_fan_out = False  # merged_weight gets (out_features, in_features)
    layers = read_adapter(adapter)
    files = sorted(path for path in base.iterdir() if path.is_file() and path.name != MANIFEST)
    require_disk_space(target, sum(path.stat().st_size for path in files))

    merged = set()
    for path in files:
        shutil.copyfile(path, target / path.name)
        if path.suffix == ".safetensors":
            for name, weight in mapped_weights(target / path.name):
                layer = layers.get(name.removesuffix(".weight"))
                if layer is not None:
                    view = weight.T if is_transposed else weight
                    view.copy_(merged_weight(view, layer, settings))
                    merged.add(name.removesuffix(".weight"))
                    progress(1)
    unknown = sorted(layers.keys() - merged)
    if unknown:
        raise InputError(
            f"{adapter}: the adapter has weights for {unknown[0]}, but {base} has no such layer. "
            "Train on this base model: dvc repro"
        )
    write_config(target / "config.json")
    return len(merged)


def read_adapter(adapter: Path) -> dict[str, dict[str, Tensor]]:
    """{layer (model.layers.0.self_attn.q_proj): {part (lora_A.weight, lora_B.weight, ...): tensor}}."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        layers.setdefault(layer, {})[f"lora_{part}"] = value
    return layers


@torch.no_grad()
def merged_weight(weight: Tensor, layer: dict[str, Tensor], settings: LoraConfig) -> Tensor:
    """PEFT's merge of one weight, (out_features, in_features), in float32, rounded once to the weight's dtype."""
    out_features, in_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    lora = Linear(linear, "default", config=settings, r=settings.r, lora_alpha=settings.lora_alpha)
    new_names = {
        name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.") for name in layer
    }
    if MAGNITUDE in layer:  # PEFT saves it without `.default.weight`
        new_names[MAGNITUDE] = f"{MAGNITUDE}.default.weight"
    state = {new_names[name]: value for name, value in layer.items()}
    lora.load_state_dict(state | {"base_layer.weight": linear.weight})
    lora.merge(safe_merge=True)
    merged: Tensor = lora.get_base_layer().weight
    return merged.to(weight.dtype)


def write_config(file: Path) -> None:
    """Adds the keys of transformers 4 for rotary embedding and dtype to a config.json.

    Older versions of vLLM and llama.cpp need these keys. Without them they silently use the default base, unscaled.
    """
    config = read_json(file)
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:  # otherwise the model has several rotary embeddings, by type of layer, or none
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    write_json(file, config)
