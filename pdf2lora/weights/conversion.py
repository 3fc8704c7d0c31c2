"""A source model in Meta's or Hugging Face's layout -> the base model in Hugging Face's layout."""

from pathlib import Path

from pdf2lora.weights.huggingface import copy_huggingface
from pdf2lora.weights.layout import find_layout
from pdf2lora.weights.meta import convert_meta
from pdf2lora.weights.params_json import require_version
from pdf2lora.weights.safetensors_files import Progress


def convert(
    source: Path,
    target: Path,
    *,
    llama_version: str | None,
    max_shard_gib: float,
    progress: Progress = lambda done, total: None,
) -> dict[str, object]:
    """Writes the source model in the folder `source` to the empty folder `target`, in Hugging Face's layout.

    All files are checked before the first one is written. The weights stay in memory-mapped files and are written some
    rows at a time, so memory does not grow with the model.

    Files in Meta's layout are converted: weights keep their dtype, model-parallel shards are joined, rotary pairs are
    reordered, tied embeddings are written once. Files in Hugging Face's layout are checked and copied.

    llama_version: a key of params_json.VERSIONS. Meta's layout needs it, Hugging Face's does not.
    max_shard_gib: upper limit of a safetensors file, in GiB. A larger weight gets its own file.
    progress: called with (bytes written, bytes in all) as files are written.

    Returns the summary for metrics/convert.json: layout ("meta" or "huggingface"), num_parameters, num_shards (weight
    files read), num_files (weight files written), hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size,
    vocab_size, tied, dtype, rope_theta, rope_factor, context_length.

    Raises InputError if a file is missing or damaged, contains code or contradicts another one. Nothing was written.
    """
    if find_layout(source) == "huggingface":
        return copy_huggingface(source, target, llama_version, progress)
    return convert_meta(source, target, require_version(source, llama_version), max_shard_gib, progress)
