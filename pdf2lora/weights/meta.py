"""Meta's layout (params.json, consolidated.NN.pth, tokenizer.model) -> Hugging Face's.

Sources: meta-llama/llama-models, models/llama3/model.py (names, shapes, rotary pairs); transformers 4.47,
convert_llama_weights_to_hf.py; Su et al. 2021, arXiv:2104.09864 (rotary embedding).
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.free_space import require_disk_space
from pdf2lora.weights.config_json import summarize
from pdf2lora.weights.converted_tokenizer import ConvertedTokenizer
from pdf2lora.weights.meta_shards import Shard, read_shards, shard_name
from pdf2lora.weights.params_json import ROPE_SCALING, VERSIONS, ModelArgs, read_model_args
from pdf2lora.weights.safetensors_files import SAFETENSORS_DTYPES, Progress, plan_files, write_weights
from pdf2lora.weights.sharded_weights import ShardedWeight
from pdf2lora.weights.tokenizer import read_tokenizer

# Names and shapes of the weights in both layouts.
META_EMBEDDING, META_HEAD, META_NORM = "tok_embeddings.weight", "output.weight", "norm.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

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
META_ROTARY_WEIGHTS = ("attention.wq.weight", "attention.wk.weight")


def convert_meta(
    source: Path, target: Path, llama_version: str, max_shard_gib: float, progress: Progress
) -> dict[str, object]:
    """Converts the files in `source`; arguments, result and errors as in conversion.convert."""
    args = read_model_args(source / "params.json", llama_version)
    tokenizer = read_tokenizer(source / "tokenizer.model", llama_version)
    shards = read_shards(source)

    weights = plan_weights(source, args, shards)
    vocab_size = weights[EMBEDDING].shape[0]
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{source / 'tokenizer.model'}: the tokenizer has {tokenizer.vocab_size} tokens with the special ones, but "
            f"{META_EMBEDDING} has {vocab_size} rows. Use the tokenizer.model of this source model."
        )
    files = plan_files(weights, max_shard_gib)
    require_disk_space(target, sum(weight.num_bytes for weight in weights.values()))
    config = huggingface_config(args, weights, tokenizer, llama_version)

    write_weights(target, files, progress)
    write_json(target / "config.json", config)
    write_json(target / "generation_config.json", tokenizer.token_ids())
    tokenizer.write(target, context_length=VERSIONS[llama_version].context_length)
    return {
        "layout": "meta",
        "num_parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "num_shards": len(shards),
        "num_files": len(files),
        **summarize(SimpleNamespace(**config), str(config["dtype"])),
    }


def huggingface_config(
    args: ModelArgs, weights: dict[str, ShardedWeight], tokenizer: ConvertedTokenizer, llama_version: str
) -> dict[str, object]:
    """The config.json of the converted model."""
    version = VERSIONS[llama_version]
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if version.rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": version.rope_factor, **ROPE_SCALING}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "transformers_version": "5.0.0",  # uses these names; transformers 5.17 warns of a wrong tokenizer without it
        "dtype": str(weights[EMBEDDING].dtype).removeprefix("torch."),
        "vocab_size": weights[EMBEDDING].shape[0],
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
        "tie_word_embeddings": HEAD not in weights,
        **tokenizer.token_ids(),
    }


def plan_weights(source: Path, args: ModelArgs, shards: list[Shard]) -> dict[str, ShardedWeight]:
    """{Hugging Face's name: weight} of the whole model, without lm_head.weight if it equals the embedding.

    Raises InputError if the shards and params.json contradict each other. The message names the weight and its shape.
    """
    paths = [source / shard_name(number) for number in range(len(shards))]
    table, sizes = _expected_weights(args, shards, paths[0])
    expected_names = {row[0] for row in table}
    for shard, path in zip(shards, paths, strict=True):
        if unexpected := sorted(shard.keys() - expected_names):
            raise InputError(
                f"{path}: the weight {unexpected[0]} is not part of a text-only Llama with n_layers {args.n_layers} "
                "(params.json). Use an unquantized text-only source model with its params.json."
            )
    embedding = shards[0][META_EMBEDDING]
    weights: dict[str, ShardedWeight] = {}
    for name, new_name, split_dim, axes in table:
        shape = [sizes[axis] / (len(shards) if dim == split_dim else 1) for dim, axis in enumerate(axes)]
        parts = tuple(_part(shard, name, path) for shard, path in zip(shards, paths, strict=True))
        for part, path in zip(parts, paths, strict=True):
            if list(part.shape) != shape or not part.numel():
                raise InputError(
                    f"{path}: {name} has shape {tuple(part.shape)}, expected ({', '.join(f'{n:g}' for n in shape)}) "
                    f"from dim {args.dim}, n_heads {args.n_heads}, n_kv_heads {args.n_kv_heads} in params.json and "
                    f"{len(shards)} consolidated.NN.pth. Use all files of one source model."
                )
            if part.dtype not in SAFETENSORS_DTYPES or part.dtype != embedding.dtype:
                raise InputError(
                    f"{path}: {name} is {part.dtype} and {META_EMBEDDING} is {embedding.dtype}; all weights must be "
                    "bfloat16, all float16 or all float32. Use an unquantized source model."
                )
            if not part.is_contiguous():  # a stride of 0 would let a small file fill the disk
                raise InputError(f"{path}: {name} is a strided view. Use Meta's original file.")
        weights[new_name] = ShardedWeight(
            parts[:1] if split_dim is None else parts,
            split_dim=split_dim or 0,
            head_dim=args.head_dim if name.endswith(META_ROTARY_WEIGHTS) else None,
        )
    if args.vocab_size not in (None, sizes["vocab"]):
        raise InputError(
            f"{source / 'params.json'}: vocab_size is {args.vocab_size}, but {META_EMBEDDING} has {sizes['vocab']} "
            "rows. Use the files of one source model."
        )
    if META_HEAD in shards[0] and weights[HEAD].equals(weights[EMBEDDING]):
        del weights[HEAD]
    return weights


def _expected_weights(args: ModelArgs, shards: list[Shard], path: Path) -> tuple[list[WeightRow], dict[str, int]]:
    """The WeightRow of each weight of the model, and the size of each axis."""
    layers = {int(match[1]) for name in shards[0] if (match := re.match(r"layers\.(\d{1,6})\.", name))}
    absent = next((number for number in range(args.n_layers) if number not in layers), None)
    if absent is not None:
        raise InputError(
            f"{path}: the weights of layer {absent} are missing, but n_layers is {args.n_layers} in params.json. "
            "Use the files of one source model."
        )
    embedding = _part(shards[0], META_EMBEDDING, path)
    split_dim = 0 if embedding.shape[1] == args.dim else 1  # Llama 3 splits the tokens, Llama 1 and 2 the features
    sizes = {
        "vocab": embedding.shape[0] * (len(shards) if split_dim == 0 else 1),
        "hidden": args.dim,
        "query": args.n_heads * args.head_dim,
        "key": args.n_kv_heads * args.head_dim,
        "intermediate": _part(shards[0], "layers.0.feed_forward.w1.weight", path).shape[0] * len(shards),
    }
    table: list[WeightRow] = [(META_EMBEDDING, EMBEDDING, split_dim, ("vocab", "hidden"))]
    for n in range(args.n_layers):
        table += [(f"layers.{n}.{old}", f"model.layers.{n}.{new}", dim, axes) for old, new, dim, axes in LAYER_WEIGHTS]
    table.append((META_NORM, NORM, None, ("hidden",)))
    if META_HEAD in shards[0]:
        table.append((META_HEAD, HEAD, 0, ("vocab", "hidden")))
    return table, sizes


def _part(shard: Shard, name: str, path: Path) -> Tensor:
    if name not in shard:
        raise InputError(f"{path}: the weight {name} is missing. Use all files of one text-only Llama.")
    part, num_dims = shard[name], 1 if name.endswith("norm.weight") else 2
    if part.dim() != num_dims:
        raise InputError(
            f"{path}: {name} has shape {tuple(part.shape)}, expected {num_dims} dimension(s). Use the files of a Llama."
        )
    return part
