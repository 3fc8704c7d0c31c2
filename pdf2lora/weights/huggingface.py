"""A checkpoint that is in Hugging Face layout already: checked and copied."""

import json
import math
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from pdf2lora.errors import InputError
from pdf2lora.weights.json_files import describe, integer, read_json, require_disk_space
from pdf2lora.weights.names import DTYPE_NAMES, LAYER_WEIGHTS, NEW_EMBEDDING, NEW_HEAD
from pdf2lora.weights.safetensors_files import Progress


def copy_huggingface(source: Path, target: Path, progress: Progress) -> dict[str, object]:
    path = source / "config.json"
    config = read_json(path)
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise InputError(
            f"{path}: architectures is {json.dumps(config.get('architectures'))}, must be "
            '["LlamaForCausalLM"]; use a text-only Llama checkpoint'
        )
    if "quantization_config" in config:
        raise InputError(f"{path}: a quantized checkpoint; use the unquantized one, training quantizes it by itself")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{path}: {name} is {json.dumps(config[name])}, must be an object; fetch the file again")
    num_layers, vocab_size = integer(config, "num_hidden_layers", path), integer(config, "vocab_size", path)
    tied = config.get("tie_word_embeddings", False)

    weight_files, shapes, dtype = _read_safetensors(source)
    needed = [NEW_EMBEDDING, "model.norm.weight", *([] if tied else [NEW_HEAD])]
    of_layers = (f"model.layers.{n}.{name}" for n in range(num_layers) for _, name, *_ in LAYER_WEIGHTS)
    missing = next((name for name in chain(needed, of_layers) if name not in shapes), None)
    if missing is not None:
        raise InputError(f"{source}: no weight {missing} in *.safetensors; fetch all files of the checkpoint")
    rows, num_tokens = shapes[NEW_EMBEDDING][0], _count_tokens(source / "tokenizer.json")
    if not num_tokens <= rows == vocab_size:
        raise InputError(
            f"{source}: {num_tokens} tokens in tokenizer.json, vocab_size {vocab_size} in config.json, {rows} rows in "
            f"{NEW_EMBEDDING}; rows and vocab_size must be equal and hold all tokens: use the files of one checkpoint"
        )
    _require_shapes(path, config, shapes)

    names = ["config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
    names += ["model.safetensors.index.json"]
    copied = [path for name in names if (path := source / name).is_file()]
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
        "num_parameters": sum(map(math.prod, shapes.values())),
        "num_shards": len(weight_files),
        "num_files": len(weight_files),
        **describe({**config, "dtype": dtype, "tie_word_embeddings": tied}),
    }


def _require_shapes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError if config.json speaks of other sizes than the weights have: they would be made in memory."""
    hidden, heads = integer(config, "hidden_size", path), integer(config, "num_attention_heads", path)
    head_dim = hidden // heads if config.get("head_dim") is None else integer(config, "head_dim", path)
    kv_heads = heads if config.get("num_key_value_heads") is None else integer(config, "num_key_value_heads", path)
    sizes = {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "query": heads * head_dim,
        "key": kv_heads * head_dim,
        "intermediate": integer(config, "intermediate_size", path),
    }
    axes = {NEW_EMBEDDING: ("vocab", "hidden"), "model.norm.weight": ("hidden",), NEW_HEAD: ("vocab", "hidden")}
    for n in range(config["num_hidden_layers"]):
        axes |= {f"model.layers.{n}.{name}": layer_axes for _, name, _, layer_axes in LAYER_WEIGHTS}
    for name, names in axes.items():
        expected = tuple(sizes[axis] for axis in names)
        if name in shapes and shapes[name] != expected:
            raise InputError(
                f"{path}: {name} must have shape {expected} by the sizes in it, but has {shapes[name]}; "
                "use the files of one checkpoint"
            )


def _read_safetensors(source: Path) -> tuple[list[Path], dict[str, tuple[int, ...]], str]:
    """The safetensors files of a Hugging Face checkpoint, {name: shape} of the weights in them, and their dtype."""
    index = source / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: weight_map must say which file holds which weight; fetch the file again")
    names = sorted({str(name) for name in weight_map.values()}) or ["model.safetensors"]
    if not weight_map and not (source / names[0]).is_file() and any(source.glob("*.bin")):
        raise InputError(
            f"{source}: weights only in pickled *.bin files, which can run code when read; convert them to safetensors "
            "(transformers' save_pretrained does) and put those there"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[str] = set()
    for name in names:
        path = source / name
        if "\0" in name or path.parent != source or not path.is_file():
            named_by = f", which {index.name} names" if weight_map else ""
            raise InputError(f"{path}: no such file in the folder{named_by}; fetch all files of the checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                shapes |= {key: tuple(weight.get_shape()) for key, weight in found.items()}
                dtypes |= {weight.get_dtype() for weight in found.values()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a safetensors file, or cut short ({error}); fetch the file again") from None
    if len(dtypes) != 1 or not dtypes <= DTYPE_NAMES.keys():
        raise InputError(
            f"{source}: weights of dtype {', '.join(sorted(dtypes))}, must be all BF16, all F16 or all F32; "
            "use an unquantized checkpoint"
        )
    return [source / name for name in names], shapes, DTYPE_NAMES[dtypes.pop()]


def _count_tokens(path: Path) -> int:
    if not path.is_file():
        raise InputError(f"{path}: no such file; fetch it with the checkpoint")
    try:
        return Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # tokenizers raises nothing more special
        raise InputError(f"{path}: not a tokenizer ({error}); fetch the file again") from None
