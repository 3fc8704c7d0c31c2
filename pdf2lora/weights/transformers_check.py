"""Loads a source model in Hugging Face's layout with transformers, without its weights.

transformers decides which weights a model needs and which it ignores. The model is built on the meta device, which
allocates no memory. Its names and shapes are compared with the headers of the files.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface_files import QUANT_STATE, HuggingFaceFiles
from pdf2lora.weights.json_files import copy_json
from pdf2lora.weights.safetensors_header import StoredWeight

JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")  # that transformers reads
MAX_REASON_CHARACTERS = 200  # of an error message of transformers


def load_without_weights(source: Path, files: HuggingFaceFiles) -> Any:
    """The model on the meta device (a transformers.PreTrainedModel).

    Raises InputError if transformers cannot load the model, or config.json and the weights contradict each other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet_transformers(), _readable_folder(source, files) as folder:
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if files.is_4bit:  # bitsandbytes cannot load 4-bit weights on the meta device
                del config.quantization_config
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except Exception as error:  # transformers raises many types
            raise InputError(_cannot_load(source, error, folder)) from None
    for name, stored, expected in sorted(report["mismatched_keys"]):
        if not (files.is_4bit and _is_packed(files.weights[name], expected)):
            raise InputError(
                f"{source / 'config.json'}: with the sizes in this file, {name} must have shape {tuple(expected)}, but "
                f"it has {tuple(stored)}. Use the files of one source model."
            )
    for name in sorted(report["missing_keys"]):
        raise InputError(f"{source}: *.safetensors lack the weight {name}. Download all files of the source model.")
    for name in sorted(report["unexpected_keys"]):
        if not (files.is_4bit and QUANT_STATE.search(name)):
            raise InputError(
                f"{source}: the weight {name} is not part of a {type(model).__name__} with this config.json. "
                "Use the files of one source model."
            )
    model.tie_weights()  # so a stored copy of a tied head does not count twice
    return model


@contextmanager
def _readable_folder(source: Path, files: HuggingFaceFiles) -> Iterator[str]:
    """Yields a temporary folder with links to the weights and with the JSON files without byte order marks."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in files.weight_files:
            (folder / file.name).symlink_to(file.resolve())
        for file in source.glob("*.json"):
            if file.name in JSON_FILES:
                copy_json(file, folder / file.name)
        yield name


def _is_packed(weight: StoredWeight, shape: Sequence[int]) -> bool:
    """Whether the bytes are a matrix of this shape, with two 4-bit weights in each byte."""
    return weight.dtype == "U8" and len(shape) == 2 and weight.num_bytes * 2 == math.prod(shape)


def _cannot_load(source: Path, error: Exception, folder: str) -> str:
    """The error message. folder: the temporary folder, which the error may name."""
    import transformers

    reason = " ".join(str(error).replace(folder, str(source)).split())[:MAX_REASON_CHARACTERS].rstrip(".")
    has_code = '"auto_map"' in (source / "config.json").read_text(encoding="utf-8")
    remedy = (
        "Its own code (auto_map in config.json) is not run. Use a model that transformers knows."
        if has_code
        else "Correct config.json, or use another model."
    )
    return (
        f"{source / 'config.json'}: transformers {transformers.__version__} cannot load this model "
        f"({type(error).__name__}: {reason}). {remedy}"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turns off load reports of transformers, and its progress bars for good (as model/loading.py does)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
