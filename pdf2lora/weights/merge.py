"""An adapter merged into its unquantized base: base + scaling * B A, or DoRA's renormalized sum.

Merging into a 4-bit base rounds the sum to 4 bits again and loses much of what was learned, so it is not done here. The
base's files are copied and the adapted weights overwritten in the copies, in place and one at a time: shapes and
types stay, hence every byte's place in the file too, and memory holds a single weight whatever the model's size.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.weights.safetensors_files import mapped_weights

Progress = Callable[[int], object]  # weights merged since the last call


PREFIX = "base_model.model."  # of PEFT's names


def merge(base: Path, adapter: Path, target: Path, progress: Progress = lambda num_weights: None) -> int:
    """Fills the empty folder `target` with the base, the adapter merged into its weights; returns how many it changed.

    The base's manifest stays behind: its hashes are not those of what is written here.

    base: a Hugging Face folder of safetensors, unquantized; adapter: a PEFT folder of LoRA, rsLoRA or DoRA.

    Raises:
        InputError: the disk is too small, or the adapter has weights for which the base has none.
    """
    settings = LoraConfig.from_pretrained(str(adapter))
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
                    weight.copy_(merged_weight(weight, layer, settings))
                    merged.add(name.removesuffix(".weight"))
                    progress(1)
    unknown = sorted(layers.keys() - merged)
    if unknown:
        raise InputError(
            f"{adapter}: has weights for {unknown[0]}, which {base} has not; run dvc repro to train on this base"
        )
    write_config(target / "config.json")
    return len(merged)


def read_adapter(adapter: Path) -> dict[str, dict[str, Tensor]]:
    """Layer (model.layers.0.self_attn.q_proj) -> what the adapter has for it (lora_A.weight, lora_B.weight, ...)."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_")
        layers.setdefault(layer, {})[f"lora_{part}"] = value
    return layers


@torch.no_grad()
def merged_weight(weight: Tensor, layer: dict[str, Tensor], settings: LoraConfig) -> Tensor:
    """PEFT's own merge of one weight, (out_features, in_features), in float32; rounded once, to the weight's type."""
    out_features, in_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    lora = Linear(linear, "default", config=settings, r=settings.r, lora_alpha=settings.lora_alpha)
    named = {name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.") for name in layer}
    magnitude = "lora_magnitude_vector"  # DoRA's, which PEFT saves without `.default.weight`
    named |= {magnitude: f"{magnitude}.default.weight"} if magnitude in layer else {}
    lora.load_state_dict({named[name]: value for name, value in layer.items()} | {"base_layer.weight": linear.weight})
    lora.merge(safe_merge=True)
    summed: Tensor = lora.get_base_layer().weight
    return summed.to(weight.dtype)


def write_config(file: Path) -> None:
    """Says the rotary embedding and the type in transformers 4's words too, which vLLM and llama.cpp of its time read.

    Without them they would take the default base and no scaling, without a word.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters", {}))
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def require_disk_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise InputError(
            f"{target}: {num_bytes / 2**30:.1f} GiB to write, {math.floor(free / 2**30 * 10) / 10:.1f} GiB free; "
            "make room on that disk"
        )
