"""The safetensors files of a folder in Hugging Face's layout, and the error for a folder without any."""

import re
from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.json_files import read_json
from pdf2lora.weights.safetensors_header import StoredWeight, read_header

# Rotary frequencies, and the causal masks of GPT-2 and GPT-NeoX
BUFFER = re.compile(r"rotary_emb\.inv_freq$|\.(attention|attn)\.(masked_)?bias$")


def read_weights(source: Path) -> tuple[list[Path], dict[str, StoredWeight]]:
    """The files, and the entries of their headers by name. Leaves out buffers, which follow from the config.

    Raises InputError if a file is missing or damaged, lies outside the folder, or is of another format.
    """
    index = source / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: weight_map must map each weight to its file. Download the file again.")
    names = sorted({str(name) for name in weight_map.values()}) or ["model.safetensors"]
    if not weight_map and not (source / names[0]).is_file():
        raise InputError(missing_weights_message(source))
    weights: dict[str, StoredWeight] = {}
    for name in names:
        path = source / name
        if "\0" in name or path.parent != source or not path.is_file():
            named_by = f", but {index.name} names it" if weight_map else ""
            raise InputError(
                f"{path}: the file is not in the folder{named_by}. Download all files of the source model."
            )
        weights |= read_header(path)
    absent = next((name for name in weight_map if name not in weights), None)
    if absent is not None:
        raise InputError(
            f"{source}: {index.name} names the weight {absent}, but no file has it. Download all files of the model."
        )
    return [source / name for name in names], {
        name: weight for name, weight in weights.items() if not BUFFER.search(name)
    }


def missing_weights_message(source: Path) -> str:
    """The error message for a folder without model.safetensors and without its index."""
    if any(source.glob("*.gguf")):
        return (
            f"{source}: the weights are only in GGUF files. Download the model in Hugging Face's layout (config.json, "
            "*.safetensors, tokenizer.json), or convert it with transformers (from_pretrained has gguf_file)."
        )
    if any(source.glob("*.bin")) or any(source.glob("*.pt")):
        return (
            f"{source}: the weights are only in pickled *.bin files, which can run code when they are read. "
            "Convert them to safetensors (transformers' save_pretrained does it) and put those there."
        )
    if (source / "adapter_config.json").is_file():
        return adapter_message(source)
    if any(source.glob("model-*-of-*.safetensors")):
        return f"{source}: model.safetensors.index.json is missing. Download all files of the source model."
    return f"{source}: model.safetensors is missing. Download all files of the source model."


def adapter_message(source: Path) -> str:
    """The error message for a folder that holds an adapter instead of a model."""
    try:
        base = read_json(source / "adapter_config.json").get("base_model_name_or_path")
    except InputError:
        base = None
    return (
        f"{source}: this is an adapter, not a base model. Download the model that it was trained on"
        f"{f' ({base})' if base else ''}, or merge the adapter into it first."
    )
