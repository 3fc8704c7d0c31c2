"""Meta layout -> Hugging Face layout: params.json and consolidated.NN.pth -> config.json and safetensors.

Everything is read and checked first (of the weights only the shapes: they stay in memory-mapped files), then planned,
then written a slab of rows at a time, so that memory does not grow with the checkpoint.
Sources: meta-llama/llama-models, models/llama3/model.py and args.py (names, shapes, rotary pairs, rope scaling);
transformers 4.47, convert_llama_weights_to_hf.py (the last converter it shipped); Su et al. 2021, arXiv:2104.09864.
"""

import json
import math
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.llama_tokenizer import read_tokenizer

Progress = Callable[[int, int], None]  # bytes written, bytes in all

SLAB_BYTES = 64 * 2**20  # what is held in memory at once
MAX_DIMENSION = 2**20  # eight times the largest number in any Llama's params.json


@dataclass(frozen=True)
class Version:
    """What params.json leaves unsaid; context_length in tokens, rope_factor None where no wavelength is stretched."""

    context_length: int
    rope_factor: float | None
    rope_theta: float  # what Meta's code takes where params.json has none


VERSIONS = {
    "1": Version(2048, None, 10000.0),
    "2": Version(4096, None, 10000.0),
    "3": Version(8192, None, 500000.0),
    "3.1": Version(131072, 8.0, 500000.0),
    "3.2": Version(131072, 32.0, 500000.0),
}
LLAMA_VERSIONS = tuple(VERSIONS)
ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

# Meta's name, Hugging Face's name, the dimension that model-parallel shards split (None: each has a copy), shape
WeightRow = tuple[str, str, int | None, tuple[str, ...]]
LAYER_WEIGHTS: tuple[WeightRow, ...] = (
    ("attention_norm.weight", "input_layernorm.weight", None, ("hidden",)),
    ("attention.wq.weight", "self_attn.q_proj.weight", 0, ("query", "hidden")),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0, ("key", "hidden")),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0, ("key", "hidden")),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1, ("hidden", "query")),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None, ("hidden",)),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0, ("intermediate", "hidden")),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0, ("intermediate", "hidden")),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1, ("hidden", "intermediate")),
)
ROTARY_WEIGHTS = ("attention.wq.weight", "attention.wk.weight")
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
NEW_EMBEDDING, NEW_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ModelArgs:
    """params.json, under Meta's names; vocab_size is None where the file leaves it to the tokenizer (-1)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    norm_eps: float
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model; its `parts`, one from each shard, are joined along `split_dim` when rows are read.

    `head_dim` is set where rotary pairs change places.
    """

    parts: tuple[Tensor, ...]
    split_dim: int = 0
    head_dim: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        part = self.parts[0].shape
        return tuple(size * len(self.parts) if dim == self.split_dim else size for dim, size in enumerate(part))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slabs(self) -> Iterator[Tensor]:
        """The weight from its first row to its last, contiguous, about SLAB_BYTES (at least one head) at a time."""
        unit = self.head_dim or 1
        step = unit * max(1, SLAB_BYTES * self.shape[0] // (self.num_bytes * unit))
        for start in range(0, self.shape[0], step):
            rows = self.rows(start, min(start + step, self.shape[0]))
            yield (half_split(rows, self.head_dim) if self.head_dim else rows).contiguous()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the joined weight: a view of the mapped file where one part holds them, else a copy."""
        if self.split_dim == 1:
            pieces = [part[start:stop] for part in self.parts]
        else:
            height = self.parts[0].shape[0]
            holders = range(start // height, (stop - 1) // height + 1)
            pieces = [self.parts[n][max(start - n * height, 0) : min(stop - n * height, height)] for n in holders]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.split_dim)


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of each head from Meta's rotary pairs (2i, 2i + 1) to Hugging Face's (i, i + head_dim / 2).

    rows: (heads * head_dim, hidden), of the projection to queries or keys; the result has the same shape.
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def convert(
    source: Path,
    target: Path,
    *,
    llama_version: str,
    max_shard_gib: float,
    progress: Progress = lambda done, total: None,
) -> dict[str, object]:
    """Writes the checkpoint in `source` in Hugging Face layout into `target`, an empty folder.

    A Meta checkpoint is converted: weights keep their dtype, model-parallel shards are joined, rotary pairs reordered,
    tied embeddings written once. A Hugging Face checkpoint (a folder with a config.json) is checked and copied, and
    `llama_version` is not used.

    llama_version: one of LLAMA_VERSIONS; Meta's files do not tell 3.1 from 3.2, whose rope factors differ.
    max_shard_gib: upper limit of a safetensors file, in GiB; a weight larger than that gets a file of its own.
    progress: called with (bytes written, bytes in all) as the weights are written.

    Returns what the model is: layout ("meta" or "huggingface"), num_parameters, num_shards (weight files read),
    num_files (weight files written), hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, vocab_size,
    tied, dtype, rope_theta, rope_factor, context_length.
    Raises InputError, before anything is written, if a file is missing, damaged, would run code or contradicts another.
    """
    if llama_version not in VERSIONS:
        raise InputError(
            f'{_version_key(source)}: "{llama_version}" is not a Llama version; use one of {", ".join(LLAMA_VERSIONS)}'
        )
    if (source / "config.json").is_file():
        return _copy_hugging_face(source, target, progress)
    if (source / "params.json").is_file() or any(source.glob("consolidated.*.pth")):
        return _convert_meta(source, target, llama_version, max_shard_gib, progress)
    if (source / "original" / "params.json").is_file():
        raise InputError(
            f"{source}: Meta's files are in {source / 'original'}, as the Hugging Face hub keeps them; move them up: "
            f"mv {source / 'original'}/* {source}"
        )
    raise InputError(
        f"{source}: no checkpoint; looked for params.json, consolidated.00.pth and tokenizer.model (Meta's layout) and "
        "for config.json, *.safetensors and tokenizer.json (Hugging Face's); put one of the two there"
    )


def _convert_meta(
    source: Path, target: Path, llama_version: str, max_shard_gib: float, progress: Progress
) -> dict[str, object]:
    version = VERSIONS[llama_version]
    args = read_model_args(source / "params.json", llama_version)
    tokenizer = read_tokenizer(source / "tokenizer.model", llama_version=llama_version, key=_version_key(source))
    shards = read_shards(source)

    weights = plan_weights(source, args, shards)
    vocab_size = weights[NEW_EMBEDDING].shape[0]
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{source / 'tokenizer.model'}: {tokenizer.vocab_size} tokens, special ones included, but {EMBEDDING} has "
            f"{vocab_size} rows; use the tokenizer.model that came with the checkpoint"
        )
    files = plan_files(weights, max_shard_gib)
    _check_room(target, sum(weight.num_bytes for weight in weights.values()))
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if version.rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": version.rope_factor, **ROPE_SCALING}
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "transformers_version": "5.0.0",  # whose spelling this is; 5.17 warns of a wrong tokenizer without it
        "dtype": DTYPE_NAMES[DTYPES[weights[NEW_EMBEDDING].dtype]],
        "vocab_size": vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": version.context_length,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": NEW_HEAD not in weights,
        **tokenizer.token_ids(),
    }

    write_weights(target, files, progress)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", dict(tokenizer.token_ids()))
    tokenizer.write(target, context_length=version.context_length)
    return {
        "layout": "meta",
        "num_parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "num_shards": len(shards),
        "num_files": len(files),
        **_describe(config),
    }


def read_model_args(path: Path, llama_version: str) -> ModelArgs:
    """Reads params.json; raises InputError if a number is missing, absurd or contradicts another or the version."""
    params = _read_json(path)
    version, key = VERSIONS[llama_version], _version_key(path.parent)
    scaled = params.get("use_scaled_rope", False)
    if scaled != (version.rope_factor is not None):
        has = "no scaled rope" if version.rope_factor is None else f"scaled rope (factor {version.rope_factor:g})"
        fitting = [name for name, other in VERSIONS.items() if (other.rope_factor is not None) == scaled]
        raise InputError(
            f'{path}: use_scaled_rope is {json.dumps(scaled)}, but {key} is "{llama_version}", which has {has}; '
            f"set {key} to the version of the checkpoint ({' or '.join(fitting)})"
        )
    dim, n_heads = _whole(params, "dim", path), _whole(params, "n_heads", path)
    n_kv_heads = n_heads if params.get("n_kv_heads") is None else _whole(params, "n_kv_heads", path)
    if dim % (2 * n_heads):
        raise InputError(
            f"{path}: dim is {dim}, must be a multiple of 2 * n_heads ({2 * n_heads}): heads consist of pairs; "
            "fetch the file again"
        )
    if n_heads % n_kv_heads:
        raise InputError(
            f"{path}: n_heads is {n_heads}, must be a multiple of n_kv_heads ({n_kv_heads}); fetch the file again"
        )
    return ModelArgs(
        dim=dim,
        n_layers=_whole(params, "n_layers", path),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=None if params.get("vocab_size", -1) == -1 else _whole(params, "vocab_size", path),
        norm_eps=_positive(params, "norm_eps", path),
        rope_theta=_positive({"rope_theta": version.rope_theta, **params}, "rope_theta", path),
    )


def _whole(params: Mapping[str, Any], name: str, path: Path) -> int:
    value = params.get(name)
    if type(value) is int and 1 <= value <= MAX_DIMENSION:
        return value
    raise InputError(
        f"{path}: {name} is {json.dumps(value)}, must be a whole number from 1 to {MAX_DIMENSION}; fetch the file again"
    )


def _positive(params: Mapping[str, Any], name: str, path: Path) -> float:
    value = params.get(name)
    if isinstance(value, (int, float)) and 0 < value < math.inf:
        return float(value)
    raise InputError(f"{path}: {name} is {json.dumps(value)}, must be a number above 0; fetch the file again")


def read_shards(source: Path) -> list[dict[str, Tensor]]:
    """Opens consolidated.00.pth, consolidated.01.pth, ...: {Meta's name: weight}, memory-mapped, nothing read yet.

    Files in the format of torch before 1.6 cannot be mapped and are read whole into memory.
    Raises InputError if a number is left out, or a file is damaged or would run code.
    """
    names = {path.name for path in source.glob("consolidated.[0-9][0-9].pth")}
    for number in range(max(1, len(names))):
        if _shard_name(number) not in names:
            raise InputError(f"{source / _shard_name(number)}: no such file; fetch all shards of the checkpoint")
    return [_load_shard(source / name) for name in sorted(names)]


def _shard_name(number: int) -> str:
    return f"consolidated.{number:02}.pth"


def _load_shard(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        loaded = torch.load(path, mmap=is_zip, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged bytes come out of torch as anything from EOFError to UnicodeDecodeError
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise InputError(
                f"{path}: refused, it holds code to run ({code[1]}) and weights need none; "
                "use a checkpoint that torch.load(weights_only=True) accepts"
            ) from None
        raise InputError(
            f"{path}: not a torch checkpoint, or cut short ({type(error).__name__}); fetch the file again"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(weight, Tensor) for weight in loaded.values()):
        raise InputError(f"{path}: must hold weights by name and nothing else; use Meta's own file")
    # Llama 1 and 2 store the rotary frequencies, which follow from rope_theta.
    return {str(name): weight for name, weight in loaded.items() if not str(name).endswith("rope.freqs")}


def plan_weights(source: Path, args: ModelArgs, shards: list[dict[str, Tensor]]) -> dict[str, Weight]:
    """{Hugging Face's name: Weight} of the whole model, without lm_head.weight if it equals the embedding.

    Raises InputError, naming the weight and the shape it must have, if shards and params.json do not fit together.
    """
    paths = [source / _shard_name(n) for n in range(len(shards))]
    layers = {int(match[1]) for name in shards[0] if (match := re.match(r"layers\.(\d{1,6})\.", name))}
    absent = next((n for n in range(args.n_layers) if n not in layers), None)
    if absent is not None:
        raise InputError(
            f"{paths[0]}: no weights of layer {absent}, but n_layers is {args.n_layers} in params.json; "
            "use the files of one checkpoint"
        )
    embedding = _part(shards[0], EMBEDDING, paths[0])
    split_dim = 0 if embedding.shape[1] == args.dim else 1  # Llama 3 splits the tokens, 1 and 2 the features
    sizes = {
        "vocab": embedding.shape[0] * (len(shards) if split_dim == 0 else 1),
        "hidden": args.dim,
        "query": args.n_heads * args.head_dim,
        "key": args.n_kv_heads * args.head_dim,
        "intermediate": _part(shards[0], "layers.0.feed_forward.w1.weight", paths[0]).shape[0] * len(shards),
    }
    table: list[WeightRow] = [(EMBEDDING, NEW_EMBEDDING, split_dim, ("vocab", "hidden"))]
    for n in range(args.n_layers):
        table += [(f"layers.{n}.{old}", f"model.layers.{n}.{new}", dim, axes) for old, new, dim, axes in LAYER_WEIGHTS]
    table.append(("norm.weight", "model.norm.weight", None, ("hidden",)))
    if HEAD in shards[0]:
        table.append((HEAD, NEW_HEAD, 0, ("vocab", "hidden")))

    expected_names = {row[0] for row in table}
    for shard, path in zip(shards, paths, strict=True):
        if unexpected := sorted(shard.keys() - expected_names):
            raise InputError(
                f"{path}: unexpected weight {unexpected[0]}, no part of a text-only Llama with n_layers "
                f"{args.n_layers} (params.json); use an unquantized text-only checkpoint and its own params.json"
            )
    weights: dict[str, Weight] = {}
    for name, new_name, dim, axes in table:
        shape = [sizes[axis] / (len(shards) if n == dim else 1) for n, axis in enumerate(axes)]
        parts = tuple(_part(shard, name, path) for shard, path in zip(shards, paths, strict=True))
        for part, path in zip(parts, paths, strict=True):
            if list(part.shape) != shape or not part.numel():
                raise InputError(
                    f"{path}: {name} has shape {tuple(part.shape)}, expected ({', '.join(f'{n:g}' for n in shape)}) "
                    f"from dim {args.dim}, n_heads {args.n_heads}, n_kv_heads {args.n_kv_heads} in params.json and "
                    f"{len(shards)} consolidated.NN.pth; use all files of one checkpoint"
                )
            if part.dtype not in DTYPES or part.dtype != embedding.dtype:
                raise InputError(
                    f"{path}: {name} is {part.dtype} and {EMBEDDING} {embedding.dtype}, must be all bfloat16, all "
                    "float16 or all float32; use an unquantized checkpoint"
                )
            if not part.is_contiguous():  # a stride of 0 would let a small file fill the disk
                raise InputError(f"{path}: {name} is a strided view; use the checkpoint as Meta saved it")
        head_dim = args.head_dim if name.endswith(ROTARY_WEIGHTS) else None
        weights[new_name] = Weight(parts[:1] if dim is None else parts, split_dim=dim or 0, head_dim=head_dim)
    if args.vocab_size not in (None, sizes["vocab"]):
        raise InputError(
            f"{source / 'params.json'}: vocab_size is {args.vocab_size}, but {EMBEDDING} has {sizes['vocab']} rows; "
            "use the files of one checkpoint"
        )
    if HEAD in shards[0] and _equal(weights[NEW_HEAD], weights[NEW_EMBEDDING]):
        del weights[NEW_HEAD]
    return weights


def _part(shard: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in shard:
        raise InputError(f"{path}: no weight {name}; use all files of one text-only Llama checkpoint")
    part, num_dims = shard[name], 1 if name.endswith("norm.weight") else 2
    if part.dim() != num_dims:
        raise InputError(
            f"{path}: {name} has shape {tuple(part.shape)}, expected {num_dims} dimension(s); use a Llama checkpoint"
        )
    return part


def _equal(a: Weight, b: Weight) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.slabs(), b.slabs(), strict=True))


def plan_files(weights: Mapping[str, Weight], max_shard_gib: float) -> dict[str, dict[str, Weight]]:
    """Deals the weights out, in order, to files of at most max_shard_gib GiB: {file name: {weight name: Weight}}."""
    groups: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.num_bytes > max_shard_gib * 2**30:
            groups.append({})
            size = 0
        groups[-1][name] = weight
        size += weight.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}


def write_weights(target: Path, files: Mapping[str, Mapping[str, Weight]], progress: Progress) -> None:
    """Writes safetensors files into the folder `target`, and their index if there are several.

    A file is an 8-byte little-endian length, a JSON header of that length, then the bytes of the weights one after the
    other (huggingface/safetensors, README.md). The offsets follow from the shapes, so the header can go first and the
    weights a slab at a time; safetensors.serialize_file wants all weights of a file ready in memory.
    """
    total = sum(weight.num_bytes for weights in files.values() for weight in weights.values())
    done = 0
    for file_name, weights in files.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, weight in weights.items():
            start, end = end, end + weight.num_bytes
            header[name] = {"dtype": DTYPES[weight.dtype], "shape": weight.shape, "data_offsets": (start, end)}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # keeps the weights aligned
        with (target / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for weight in weights.values():
                for slab in weight.slabs():
                    file.write(slab.view(torch.uint8).numpy().data)
                    done += slab.nbytes
                    progress(done, total)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, weights in files.items() for name in weights}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(target / "model.safetensors.index.json", index)


def _copy_hugging_face(source: Path, target: Path, progress: Progress) -> dict[str, object]:
    path = source / "config.json"
    config = _read_json(path)
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
    num_layers, vocab_size = _whole(config, "num_hidden_layers", path), _whole(config, "vocab_size", path)
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
    _check_room(target, total)
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
        **_describe({**config, "dtype": dtype, "tie_word_embeddings": tied}),
    }


def _require_shapes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError if config.json speaks of other sizes than the weights have: they would be made in memory."""
    hidden, heads = _whole(config, "hidden_size", path), _whole(config, "num_attention_heads", path)
    head_dim = hidden // heads if config.get("head_dim") is None else _whole(config, "head_dim", path)
    kv_heads = heads if config.get("num_key_value_heads") is None else _whole(config, "num_key_value_heads", path)
    sizes = {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "query": heads * head_dim,
        "key": kv_heads * head_dim,
        "intermediate": _whole(config, "intermediate_size", path),
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
    weight_map = _read_json(index).get("weight_map") if index.is_file() else {}
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


def _describe(config: Mapping[str, Any]) -> dict[str, object]:
    """What the summary says of a config.json, in transformers 5's spelling (rope_parameters) or 4's (rope_scaling)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "hidden_size": config.get("hidden_size"),
        "num_layers": config["num_hidden_layers"],
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads", config.get("num_attention_heads")),
        "intermediate_size": config.get("intermediate_size"),
        "vocab_size": config["vocab_size"],
        "tied": config["tie_word_embeddings"],
        "dtype": config["dtype"],
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
        "rope_factor": rope.get("factor"),
        "context_length": config.get("max_position_embeddings"),
    }


def _version_key(source: Path) -> str:
    """The params key that says which Llama this is; a model has the name of its folder."""
    return f"models.{source.name}.llama_version"


def _check_room(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise InputError(
            f"{target}: {num_bytes / 2**30:.1f} GiB to write, {free / 2**30:.1f} GiB free; make room on that disk"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; fetch it with the checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object; fetch the file again")
    return value


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
