"""A source model in Hugging Face's layout: checked and copied."""

import json
import math
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdf2lora.errors import InputError
from pdf2lora.runtime.disk_space import require_disk_space
from pdf2lora.weights.config_json import read_sizes, summarize
from pdf2lora.weights.json_files import read_json, whole_number
from pdf2lora.weights.llama_names import EMBEDDING, HEAD, LAYER_WEIGHTS, NORM
from pdf2lora.weights.safetensors_files import Progress
from pdf2lora.weights.safetensors_header import StoredWeight, read_header

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' name -> torch's
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


def copy_huggingface(source: Path, target: Path, progress: Progress) -> dict[str, object]:
    """Checks and copies the files in `source`; arguments, result and errors as in conversion.convert."""
    path = source / "config.json"
    config = read_json(path)
    _require_supported(path, config)
    num_layers, vocab_size = whole_number(config, "num_hidden_layers", path), whole_number(config, "vocab_size", path)
    tied = config.get("tie_word_embeddings", False)

    weight_files, weights = read_weights(source)
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise InputError(
            f"{source}: the weights are of dtype {', '.join(sorted(dtypes))}, must be all BF16, all F16 or all F32. "
            "Use an unquantized source model."
        )
    required = [EMBEDDING, NORM, *([] if tied else [HEAD])]
    of_layers = (f"model.layers.{n}.{name}" for n in range(num_layers) for _, name, *_ in LAYER_WEIGHTS)
    missing = next((name for name in chain(required, of_layers) if name not in weights), None)
    if missing is not None:
        raise InputError(f"{source}: *.safetensors lack the weight {missing}. Download all files of the source model.")
    num_rows, num_tokens = weights[EMBEDDING].shape[0], _count_tokens(source / "tokenizer.json")
    if not num_tokens <= num_rows == vocab_size:
        raise InputError(
            f"{source}: tokenizer.json has {num_tokens} tokens, vocab_size in config.json is {vocab_size}, {EMBEDDING} "
            f"has {num_rows} rows. Rows and vocab_size must be equal and hold all tokens: use the files of one model."
        )
    _require_shapes(path, config, weights)

    copied = [source / name for name in OTHER_FILES if (source / name).is_file()]
    copied += [path for path in sorted(source.glob("tokenizer*")) if path.is_file()] + weight_files
    total = sum(path.stat().st_size for path in copied)
    require_disk_space(target, total)
    done = 0
    for path in copied:
        shutil.copyfile(path, target / path.name)
        done += path.stat().st_size
        progress(done, total)
    return {
        "layout": "huggingface",
        "num_parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "num_shards": len(weight_files),
        "num_files": len(weight_files),
        **summarize({**config, "dtype": DTYPES[dtypes.pop()], "tie_word_embeddings": tied}),
    }


def read_weights(source: Path) -> tuple[list[Path], dict[str, StoredWeight]]:
    """The safetensors files of a folder, and the entries of all their headers by name.

    Raises:
        InputError: a file is missing or damaged, or lies outside the folder.
    """
    index = source / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: weight_map must map each weight to its file. Download the file again.")
    names = sorted({str(name) for name in weight_map.values()}) or ["model.safetensors"]
    if not weight_map and not (source / names[0]).is_file() and any(source.glob("*.bin")):
        raise InputError(
            f"{source}: the weights are only in pickled *.bin files, which can run code when they are read. "
            "Convert them to safetensors (transformers' save_pretrained does it) and put those there."
        )
    weights: dict[str, StoredWeight] = {}
    for name in names:
        path = source / name
        if "\0" in name or path.parent != source or not path.is_file():
            named_by = f", but {index.name} names it" if weight_map else ""
            raise InputError(
                f"{path}: the file is not in the folder{named_by}. Download all files of the source model."
            )
        weights |= read_header(path)
    return [source / name for name in names], weights


def _require_supported(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise InputError(
            f"{path}: architectures is {json.dumps(config.get('architectures'))}, must be "
            '["LlamaForCausalLM"]. Use a text-only Llama.'
        )
    if "quantization_config" in config:
        raise InputError(
            f"{path}: the source model is quantized. Use the unquantized one, because training quantizes it itself."
        )
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"{path}: {key} is {json.dumps(config[key])}, must be an object. Download the file again.")


def _require_shapes(path: Path, config: Mapping[str, Any], weights: Mapping[str, StoredWeight]) -> None:
    """Raises InputError if the sizes in config.json are not those of the weights: transformers would allocate them."""
    sizes = read_sizes(config, path)
    axis_sizes = {
        "vocab": sizes.vocab_size,
        "hidden": sizes.hidden_size,
        "query": sizes.num_heads * sizes.head_dim,
        "key": sizes.num_kv_heads * sizes.head_dim,
        "intermediate": sizes.intermediate_size,
    }
    axes_of = {EMBEDDING: ("vocab", "hidden"), NORM: ("hidden",), HEAD: ("vocab", "hidden")}
    for n in range(sizes.num_layers):
        axes_of |= {f"model.layers.{n}.{name}": axes for _, name, _, axes in LAYER_WEIGHTS}
    for name, axes in axes_of.items():
        expected = tuple(axis_sizes[axis] for axis in axes)
        if name in weights and weights[name].shape != expected:
            raise InputError(
                f"{path}: by the sizes in it, {name} must have shape {expected}, but it has {weights[name].shape}. "
                "Use the files of one source model."
            )


def _count_tokens(path: Path) -> int:
    if not path.is_file():
        raise InputError(f"{path}: the file is missing. Download it with the source model.")
    try:
        return Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(f"{path}: this is not a tokenizer ({error}). Download the file again.") from None
