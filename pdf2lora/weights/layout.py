"""The layout of a source model: Meta's or Hugging Face's."""

from pathlib import Path
from typing import Literal

from pdf2lora.errors import InputError
from pdf2lora.weights.weight_files import adapter_message, missing_weights_message

# A cloned repository, Meta's folder `original` of the hub, the hub's cache (its files are links).
SUBFOLDERS = ("*/config.json", "*/params.json", "snapshots/*/config.json")


def find_layout(source: Path) -> Literal["meta", "huggingface"]:
    """Raises InputError if the folder `source` has neither layout. The message has the reason and the remedy."""
    if (source / "config.json").is_file():
        if (source / "adapter_config.json").is_file():
            raise InputError(
                f"{source}: this folder has a model and an adapter (adapter_config.json). Move the adapter's files "
                "away, or merge it into the model first."
            )
        return "huggingface"
    if (source / "consolidated.safetensors").is_file():
        raise InputError(
            f"{source}: this is the layout of Mistral's own programs (consolidated.safetensors). Download the model in "
            "Hugging Face's layout (config.json, model*.safetensors, tokenizer.json)."
        )
    if (source / "params.json").is_file() or any(source.glob("consolidated.*.pth")):
        return "meta"
    if (source / "adapter_config.json").is_file():
        raise InputError(adapter_message(source))
    if any(any(source.glob(pattern)) for pattern in ("*.gguf", "*.bin")):
        raise InputError(missing_weights_message(source))
    inner = next((file.parent for pattern in SUBFOLDERS for file in sorted(source.glob(pattern))), None)
    if inner is not None:
        raise InputError(f"{source}: the model's files are in {inner}. Copy them: cp -L {inner}/* {source}")
    raise InputError(
        f"{source}: no source model is there. Put the files there in Meta's layout (params.json, consolidated.00.pth, "
        "tokenizer.model) or in Hugging Face's (config.json, *.safetensors, tokenizer.json)."
    )
