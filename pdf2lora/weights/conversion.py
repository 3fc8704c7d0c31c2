"""Meta layout -> Hugging Face layout: params.json and consolidated.NN.pth -> config.json and safetensors.

Everything is read and checked first (of the weights only the shapes: they stay in memory-mapped files), then planned,
then written a slab of rows at a time, so that memory does not grow with the checkpoint.
Sources: meta-llama/llama-models, models/llama3/model.py and args.py (names, shapes, rotary pairs, rope scaling);
transformers 4.47, convert_llama_weights_to_hf.py (the last converter it shipped); Su et al. 2021, arXiv:2104.09864.
"""

from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface import copy_huggingface
from pdf2lora.weights.json_files import version_key
from pdf2lora.weights.meta import convert_meta
from pdf2lora.weights.params_json import LLAMA_VERSIONS, VERSIONS
from pdf2lora.weights.safetensors_files import Progress


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
            f'{version_key(source)}: "{llama_version}" is not a Llama version; use one of {", ".join(LLAMA_VERSIONS)}'
        )
    if (source / "config.json").is_file():
        return copy_huggingface(source, target, progress)
    if (source / "params.json").is_file() or any(source.glob("consolidated.*.pth")):
        return convert_meta(source, target, llama_version, max_shard_gib, progress)
    if (source / "original" / "params.json").is_file():
        raise InputError(
            f"{source}: Meta's files are in {source / 'original'}, as the Hugging Face hub keeps them; move them up: "
            f"mv {source / 'original'}/* {source}"
        )
    raise InputError(
        f"{source}: no checkpoint; looked for params.json, consolidated.00.pth and tokenizer.model (Meta's layout) and "
        "for config.json, *.safetensors and tokenizer.json (Hugging Face's); put one of the two there"
    )
