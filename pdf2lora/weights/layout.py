"""The layout of a source model: Meta's or Hugging Face's."""

from pathlib import Path
from typing import Literal

from pdf2lora.errors import InputError
from pdf2lora.weights.weight_files import adapter_message, missing_weights_message


def find_layout(source: Path) -> Literal["meta", "huggingface"]:
    """Raises InputError if the folder `source` has neither layout. The message has the reason and the remedy."""
    if (source / "config.json").is_file():
        return "huggingface"
    if (source / "consolidated.safetensors").is_file():
        raise InputError(
            f"{source}: this is the layout of Mistral's own programs (consolidated.safetensors). Download the model in "
            "Hugging Face's layout (config.json, model*.safetensors, tokenizer.json)."
        )
    if (source / "params.json").is_file() or any(source.glob("consolidated.*.pth")):
        return "meta"
    if (source / "original" / "params.json").is_file():
        raise InputError(
            f"{source}: Meta's files are in {source / 'original'}, as the Hugging Face hub keeps them. Move them up: "
            f"mv {source / 'original'}/* {source}"
        )
    if (source / "adapter_config.json").is_file():
        raise InputError(adapter_message(source))
    if any(any(source.glob(pattern)) for pattern in ("*.gguf", "*.bin")):
        raise InputError(missing_weights_message(source))
    raise InputError(
        f"{source}: no source model is there. Put the files there in Meta's layout (params.json, consolidated.00.pth, "
        "tokenizer.model) or in Hugging Face's (config.json, *.safetensors, tokenizer.json)."
    )
