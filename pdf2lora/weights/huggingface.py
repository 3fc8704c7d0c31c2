"""Copies a source model in Hugging Face's layout to the base model, after checks.

The files do not change, with these exceptions:

- A missing tokenizer.json is made from tokenizer.model.
- Keys of config.json that the pipeline reads are added or corrected: bos_token_id, eos_token_id,
  max_position_embeddings.
- Names of weights get a missing prefix: h.0 of GPT-2 becomes transformer.h.0. A tied model that stores only its head
  gets the embedding's name for it.
- tie_word_embeddings becomes false if the files have a head that differs from the embedding. transformers uses this
  head then, and so must the packed layers.
- JSON files lose a byte order mark.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.free_space import require_disk_space
from pdf2lora.weights.config_json import summarize
from pdf2lora.weights.huggingface_files import read_huggingface
from pdf2lora.weights.huggingface_tokenizer import read_huggingface_tokenizer
from pdf2lora.weights.json_files import copy_json, read_json
from pdf2lora.weights.safetensors_files import Progress, copy_with_names
from pdf2lora.weights.safetensors_header import StoredWeight
from pdf2lora.weights.special_tokens import find_bos, find_eos
from pdf2lora.weights.transformers_check import load_without_weights

COPIED_FILES = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"


def copy_huggingface(source: Path, target: Path, llama_version: str | None, progress: Progress) -> dict[str, object]:
    """Checks and copies the files in `source`; arguments, result and errors as in conversion.convert."""
    files = read_huggingface(source)
    model = load_without_weights(source, files)
    tokenizer = read_huggingface_tokenizer(source, llama_version, files.config["vocab_size"])
    config = dict(files.config) | {
        "bos_token_id": find_bos(tokenizer.tokenizer, tokenizer.config),
        "eos_token_id": find_eos(source, files.config, tokenizer.tokenizer, tokenizer.config),
        "max_position_embeddings": _context_length(source, files.config, model.config),
    }
    rename = _renaming(model, files.weights)
    if model.config.tie_word_embeddings and _has_own_head(model, files.weights, rename):
        model.config.tie_word_embeddings = config["tie_word_embeddings"] = False

    copied = [source / name for name in COPIED_FILES if (source / name).is_file()]
    copied += [path for path in sorted(source.glob("tokenizer*")) if path.is_file()]
    copied += files.weight_files
    total = sum(path.stat().st_size for path in copied)
    require_disk_space(target, total)
    if config == files.config:
        copy_json(source / "config.json", target / "config.json")
    else:
        write_json(target / "config.json", config)
    if (source / INDEX).is_file():
        _copy_index(source / INDEX, target / INDEX, rename)
    done = 0
    for path in copied:
        if rename and path in files.weight_files:
            copy_with_names(path, target / path.name, rename)
        elif path.suffix == ".json":
            copy_json(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
        done += path.stat().st_size
        progress(done, total)
    tokenizer.write(target)
    return {
        "layout": "huggingface",
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_shards": len(files.weight_files),
        "num_files": len(files.weight_files),
        **summarize(model.config, files.dtype),
    }


def _renaming(model: Any, names: Iterable[str]) -> Callable[[str], str] | None:
    """Adds the prefix of transformers' names. None if the names have it.

    A model that was saved without its head lacks the prefix, as in gpt2. transformers then adds it, but export and the
    packed layers need the names as they are in the model.
    """
    names = list(names)
    prefix, expected = f"{model.base_model_prefix}.", model.state_dict().keys()
    embedding, head = _embedding_and_head(model)
    lacks_embedding = embedding not in names and embedding.removeprefix(prefix) not in names
    if model.config.tie_word_embeddings and lacks_embedding and head in names:
        return lambda name: embedding if name == head else name
    if not any(name not in expected and prefix + name in expected for name in names):
        return None
    return lambda name: name if name in expected or name.startswith(prefix) else prefix + name


def _embedding_and_head(model: Any) -> tuple[str, str]:
    """The names of the two weights. A model without a head has an empty name."""
    modules = {module: name for name, module in model.named_modules()}
    names = [modules.get(module, "") for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    return f"{names[0]}.weight", f"{names[1]}.weight"


def _has_own_head(model: Any, weights: Mapping[str, StoredWeight], rename: Callable[[str], str] | None) -> bool:
    """Whether the files have an embedding and a head that differ."""
    stored = {rename(name) if rename else name: weight for name, weight in weights.items()}
    embedding, head = map(stored.get, _embedding_and_head(model))
    if embedding is None or head is None:
        return False
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return True
    return any(one != other for one, other in zip(embedding.chunks(), head.chunks(), strict=True))


def _copy_index(file: Path, target: Path, rename: Callable[[str], str] | None) -> None:
    if rename is None:
        copy_json(file, target)
        return
    index = read_json(file)
    weight_map = {rename(name): file_name for name, file_name in index["weight_map"].items()}
    write_json(target, index | {"weight_map": weight_map})


def _context_length(source: Path, config: Mapping[str, Any], model_config: Any) -> int:
    """max_position_embeddings, or transformers' default."""
    value = getattr(model_config, "max_position_embeddings", None)
    if type(value) is int and value > 0:
        return value
    raise InputError(
        f"{source / 'config.json'}: max_position_embeddings is missing, and transformers has no default for "
        f"{config['model_type']}. Add the number of tokens that the model can read."
    )
