"""Loads a source model in Hugging Face's layout with transformers, without its weights.

transformers decides which weights a model needs and which it ignores. The model is built on the meta device, which
allocates no memory. Its names and shapes are compared with the headers of the files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface_files import QUANT_STATE, HuggingFaceFiles
from pdf2lora.weights.safetensors_header import StoredWeight

MAX_REASON_CHARACTERS = 200  # of an error message of transformers


def load_without_weights(source: Path, files: HuggingFaceFiles) -> Any:
    """The model on the meta device (a transformers.PreTrainedModel).

    Raises:
        InputError: transformers cannot load the model, or config.json and the weights contradict each other.
    """
    with _quiet_transformers():
        return _load_4bit(source, files) if files.is_4bit else _load(source)


def _load(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises many types
        raise InputError(_cannot_load(source, error)) from None
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise InputError(_wrong_shape(source, name, tuple(stored), tuple(expected)))
    for name in sorted(report["missing_keys"]):
        raise InputError(_missing(source, name))
    for name in sorted(report["unexpected_keys"]):
        raise InputError(_unexpected(source, name, type(model).__name__))
    model.tie_weights()  # so a stored copy of a tied head does not count twice
    return model


def _load_4bit(source: Path, files: HuggingFaceFiles) -> Any:
    """Builds the model without quantization, because bitsandbytes cannot load 4-bit weights on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(_cannot_load(source, error)) from None
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {name: weight for name, weight in files.weights.items() if not QUANT_STATE.search(name)}
    for name, shape in expected.items():
        if name not in stored:
            raise InputError(_missing(source, name))
        if not _has_shape(stored[name], shape):
            raise InputError(_wrong_shape(source, name, stored[name].shape, shape))
    for name in stored:
        if name not in expected and name not in model.state_dict():  # a stored copy of a tied head
            raise InputError(_unexpected(source, name, type(model).__name__))
    return model


def _has_shape(weight: StoredWeight, shape: tuple[int, ...]) -> bool:
    if weight.dtype != "U8":
        return weight.shape == shape
    return len(shape) == 2 and weight.num_bytes * 2 == shape[0] * shape[1]  # two weights in a byte


def _missing(source: Path, name: str) -> str:
    return f"{source}: *.safetensors lack the weight {name}. Download all files of the source model."


def _wrong_shape(source: Path, name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{source / 'config.json'}: with the sizes in this file, {name} must have shape {expected}, but it has "
        f"{stored}. Use the files of one source model."
    )


def _unexpected(source: Path, name: str, model_class: str) -> str:
    return (
        f"{source}: the weight {name} is not part of a {model_class} with this config.json. "
        "Use the files of one source model."
    )


def _cannot_load(source: Path, error: Exception) -> str:
    import transformers

    reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS].rstrip(".")
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
    """Turns off progress bars and load reports of transformers."""
    from transformers.utils import logging

    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()
