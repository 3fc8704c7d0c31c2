"""An adapter whose initial matrices depend on the base's weights -> an ordinary adapter of the unchanged base.

Such an adapter (lora.init_lora_weights: loftq, pissa, olora) was trained from the initial matrices A0 and B0. The
trained model is W + s (B A - B0 A0), apart from quantization. B A - B0 A0 is the product of [B, -B0] and [A; A0], of
rank 2r (PEFT's subtract_mutated_init computes the same).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pdf2lora.runtime.files import write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write_plain_adapter(adapter: Path, initial: Path, target: Path) -> None:
    """Writes the ordinary adapter to the folder `target`, in PEFT's format.

    adapter: a PEFT folder of LoRA or rsLoRA; initial: a folder with its initial matrices under the same names.
    """
    initial_matrices = load_file(initial / WEIGHTS)
    matrices = {}
    for name, value in load_file(adapter / WEIGHTS).items():
        other = initial_matrices[name]
        matrices[name] = torch.cat([value, other]) if ".lora_A." in name else torch.cat([value, -other], dim=1)
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    factor = 2**0.5 if config["use_rslora"] else 2  # so that the scaling is the same with twice the rank
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
    save_file(matrices, target / WEIGHTS, {"format": "pt"})
    write_json(target / CONFIG, config)
