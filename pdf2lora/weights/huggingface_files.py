"""Checks the files of a source model in Hugging Face's layout without torch and transformers.

check and doctor run these checks before any work. convert also runs those of transformers_check.py.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdf2lora.errors import InputError
from pdf2lora.weights.config_json import LinearLayers
from pdf2lora.weights.json_files import read_json, whole_number
from pdf2lora.weights.lfs_pointer import require_no_pointer
from pdf2lora.weights.safetensors_header import StoredWeight
from pdf2lora.weights.weight_files import read_weights

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' name -> torch's
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
ARCHITECTURE_ENDINGS = ("ForCausalLM", "LMHeadModel")
SIZE_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", ".embeddings.weight"),
    "tokens_embed.weight",
)
HEAD = "lm_head.weight"
EXPERTS = re.compile(r"experts\.|moe\.")  # in the names of a mixture of experts
# bitsandbytes stores these with a 4-bit weight.
QUANT_STATE = re.compile(r"(?<=\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$")


@dataclass(frozen=True)
class HuggingFaceFiles:
    """A source model that passed the checks."""

    config: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    weights: Mapping[str, StoredWeight]
    """By name. Buffers, which follow from the config, are left out."""

    @property
    def is_4bit(self) -> bool:
        return is_quantized(self.config)

    @property
    def dtype(self) -> str:
        """torch's name of the dtype of most bytes; for a 4-bit model, the dtype in its config."""
        if self.is_4bit:
            return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float16")
        num_bytes = dict.fromkeys(DTYPES, 0)
        for weight in self.weights.values():
            num_bytes[weight.dtype] += weight.num_bytes
        return DTYPES[max(num_bytes, key=num_bytes.__getitem__)]

    @property
    def num_parameters(self) -> int:
        """Number of parameters. A byte of a 4-bit weight has two."""
        return sum(
            weight.num_bytes * 2 if weight.dtype == "U8" else math.prod(weight.shape)
            for name, weight in self.weights.items()
            if not QUANT_STATE.search(name)
        )

    @property
    def blocks(self) -> list[LinearLayers]:
        """The linear layers of each block. The blocks of a hybrid model differ: only some have attention."""
        blocks: defaultdict[int, LinearLayers] = defaultdict(dict)
        for name, weight in self.weights.items():
            if match := LAYER.search(name):
                block = blocks[int(match[1])]
                if name.endswith(".weight") and len(weight.shape) == 2:
                    num_outputs, num_inputs = self._shape(name)
                    block[name[match.end() :].removesuffix(".weight")] = (num_inputs, num_outputs)
        return [blocks[number] for number in sorted(blocks)]

    def _shape(self, name: str) -> Sequence[int]:
        """A 4-bit weight is stored as bytes of shape (n / 2, 1); its quantization state has the shape.

        Raises InputError if the state is missing.
        """
        weight = self.weights[name]
        if weight.dtype != "U8":
            return weight.shape
        states = [self.weights.get(f"{name}.quant_state.bitsandbytes__{kind}") for kind in ("nf4", "fp4")]
        try:
            shape: Sequence[int] = next(json.loads(b"".join(state.chunks()))["shape"] for state in states if state)
        except (StopIteration, ValueError, LookupError, TypeError):
            raise InputError(f"{weight.file}: {name} has no quantization state. Download all files again.") from None
        return shape


def read_huggingface(source: Path) -> HuggingFaceFiles:
    """Reads config.json and the headers of the weights in the folder `source`.

    Raises:
        InputError: a file is missing or damaged, the model is of a kind that cannot be trained, or two files
            contradict each other.
    """
    path = source / "config.json"
    config = read_json(path)
    _require_causal_lm(path, config)
    _require_usable_quantization(path, config)
    _require_known_rope(path, config)
    for key in SIZE_KEYS:
        if config.get(key) is not None and not isinstance(config[key], list):  # a list has a size for each layer
            whole_number(config, key, path)
    weight_files, weights = read_weights(source)
    _require_known_dtypes(source, weights, is_4bit=is_quantized(config))
    _require_no_experts(source, weights)
    _require_all_layers(source, config, weights)
    _require_rows_for_all_tokens(source, config, weights)
    return HuggingFaceFiles(config, tuple(weight_files), weights)


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a model with this config.json are stored quantized."""
    return config.get("quantization_config") is not None


def _require_causal_lm(path: Path, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or not name.endswith(ARCHITECTURE_ENDINGS) or config.get("is_encoder_decoder"):
        raise InputError(
            f"{path}: architectures is {json.dumps(architectures)}; it must name one decoder-only language model, for "
            'example ["LlamaForCausalLM"]. Use a text-only causal language model.'
        )
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: model_type is missing. Download the file again.")


def _require_usable_quantization(path: Path, config: Mapping[str, Any]) -> None:
    """A 4-bit bitsandbytes model is used as it is. Raises InputError for every other quantized model."""
    if not is_quantized(config):
        return
    quantization = config["quantization_config"]
    quantization = quantization if isinstance(quantization, dict) else {}
    if quantization.get("load_in_4bit") is True:
        return
    method = str(quantization.get("quant_method", "unknown"))
    name = "8-bit bitsandbytes" if quantization.get("load_in_8bit") else method.upper()
    raise InputError(
        f"{path}: the source model is quantized ({name}). Use the unquantized model, because training quantizes it "
        "itself, or a 4-bit bitsandbytes model."
    )


def _require_known_rope(path: Path, config: Mapping[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise InputError(f"{path}: {key} is {json.dumps(value)}; it must be an object. Download the file again.")
        # Some models have one object for each type of layer.
        by_layer_type = [inner for inner in value.values() if isinstance(inner, dict)]
        for rope in by_layer_type or [value]:
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            if rope_type not in ROPE_TYPES:
                raise InputError(
                    f"{path}: {key} has the type {json.dumps(rope_type)}; it must be one of {', '.join(ROPE_TYPES)}. "
                    "Use another model, or correct the type."
                )


def _require_known_dtypes(source: Path, weights: Mapping[str, StoredWeight], *, is_4bit: bool) -> None:
    allowed = [*DTYPES, "U8"] if is_4bit else list(DTYPES)
    for name, weight in weights.items():
        if weight.dtype not in allowed:
            raise InputError(
                f"{source}: {name} is of dtype {weight.dtype}; it must be one of {', '.join(allowed)}. "
                "Use an unquantized source model."
            )


def _require_no_experts(source: Path, weights: Iterable[str]) -> None:
    """Refuses a mixture of experts. transformers 5 keeps the experts of a layer in one tensor, not in linear layers."""
    if name := next((name for name in weights if EXPERTS.search(name)), None):
        raise InputError(
            f"{source}: this model is a mixture of experts ({name}). bitsandbytes does not quantize the experts, and "
            "LoRA does not reach them. Use a model without experts."
        )


def _require_all_layers(source: Path, config: Mapping[str, Any], weights: Iterable[str]) -> None:
    """Raises InputError if a layer has no weights, before transformers builds a model with too many layers."""
    path = source / "config.json"
    key = next((key for key in NUM_LAYERS_KEYS if key in config), NUM_LAYERS_KEYS[0])
    num_layers = whole_number(config, key, path)
    stored = {int(match[1]) for name in weights if (match := LAYER.search(name))}
    missing = next((number for number in range(num_layers) if number not in stored), None)
    if missing is not None:
        raise InputError(
            f"{source}: *.safetensors lack the weights of layer {missing}, but {key} in config.json is {num_layers}. "
            "Download all files of the source model."
        )


def _require_rows_for_all_tokens(source: Path, config: Mapping[str, Any], weights: Mapping[str, StoredWeight]) -> None:
    vocab_size = whole_number(config, "vocab_size", source / "config.json")
    # A model that ties its head to the embedding may store only the head.
    embedding = next((name for end in (EMBEDDINGS, HEAD) for name in weights if name.endswith(end)), None)
    if embedding is None:
        raise InputError(f"{source}: *.safetensors lack the embedding. Download all files of the source model.")
    if weights[embedding].shape[0] != vocab_size:
        raise InputError(
            f"{source}: vocab_size in config.json is {vocab_size}, but {embedding} has {weights[embedding].shape[0]} "
            "rows. Use the files of one model."
        )
    if (source / "tokenizer.json").is_file():
        last_id = largest_token_id(load_tokenizer(source / "tokenizer.json"))
        if last_id >= vocab_size:
            raise InputError(
                f"{source}: tokenizer.json has a token with the id {last_id}, but {embedding} has {vocab_size} rows. "
                "Use the files of one model."
            )
    elif not (source / "tokenizer.model").is_file():
        raise InputError(
            f"{source}: tokenizer.json is missing, and so is tokenizer.model. Download them, or make tokenizer.json: "
            f'AutoTokenizer.from_pretrained("{source}").save_pretrained("{source}")'
        )


def largest_token_id(tokenizer: Tokenizer) -> int:
    """The largest token id that a text can have. Special tokens do not count, because the pipeline reads them as text.

    For example, Gemma 3 1B has a special token for images without a row in the embedding.
    """
    ids = tokenizer.get_vocab(with_added_tokens=False)
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if not token.special]
    return max([*ids.values(), *added], default=-1)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer without the truncation and the padding that a tokenizer.json can set.

    Raises InputError if the file is not a tokenizer.json.
    """
    require_no_pointer(path)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(f"{path}: this is not a tokenizer ({error}). Download the file again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
