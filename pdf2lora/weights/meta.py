"""Meta layout -> Hugging Face layout."""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.weights.json_files import describe, require_disk_space, version_key, write_json
from pdf2lora.weights.names import (
    DTYPE_NAMES,
    DTYPES,
    EMBEDDING,
    HEAD,
    LAYER_WEIGHTS,
    NEW_EMBEDDING,
    NEW_HEAD,
    ROTARY_WEIGHTS,
    WeightRow,
)
from pdf2lora.weights.params_json import ROPE_SCALING, VERSIONS, ModelArgs, read_model_args
from pdf2lora.weights.safetensors_files import Progress, Weight, plan_files, write_weights
from pdf2lora.weights.tokenizer import read_tokenizer


def convert_meta(
    source: Path, target: Path, llama_version: str, max_shard_gib: float, progress: Progress
) -> dict[str, object]:
    version = VERSIONS[llama_version]
    args = read_model_args(source / "params.json", llama_version)
    tokenizer = read_tokenizer(source / "tokenizer.model", llama_version=llama_version, key=version_key(source))
    shards = read_shards(source)

    weights = plan_weights(source, args, shards)
    vocab_size = weights[NEW_EMBEDDING].shape[0]
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{source / 'tokenizer.model'}: {tokenizer.vocab_size} tokens, special ones included, but {EMBEDDING} has "
            f"{vocab_size} rows; use the tokenizer.model that came with the checkpoint"
        )
    files = plan_files(weights, max_shard_gib)
    require_disk_space(target, sum(weight.num_bytes for weight in weights.values()))
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
    write_json(target / "config.json", config)
    write_json(target / "generation_config.json", dict(tokenizer.token_ids()))
    tokenizer.write(target, context_length=version.context_length)
    return {
        "layout": "meta",
        "num_parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "num_shards": len(shards),
        "num_files": len(files),
        **describe(config),
    }


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
