"""The source model: its files, the settings that must fit it, its licence."""

from dataclasses import replace
from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.families import FAMILIES, is_target
from pdf2lora.params import ALL_LINEAR, Params, require_in_context
from pdf2lora.paths import SOURCE_MODELS
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import GIB, ModelShape, model_shape
from pdf2lora.weights.huggingface_files import HuggingFaceFiles, read_huggingface
from pdf2lora.weights.huggingface_tokenizer import require_tokenizer_version
from pdf2lora.weights.layout import find_layout
from pdf2lora.weights.lfs_pointer import require_no_pointer
from pdf2lora.weights.licences import find_licences
from pdf2lora.weights.params_json import VERSIONS, ModelArgs, read_model_args, require_version
from pdf2lora.weights.tokenizer import require_tokenizer_kind


def source_model(params: Params) -> tuple[list[Finding], ModelShape | None]:
    """The findings about the files, and the shape of the model if they can be used."""
    source = SOURCE_MODELS / params.model
    try:
        files = inspect_for(params)
    except InputError as error:
        return [Finding("problem", "source model", str(error))], None
    shape = model_shape(files, source)
    kind = "Meta's layout" if isinstance(files, ModelArgs) else files.config["architectures"][0]
    finding = Finding("ok", "source model", f"{source}: {kind}, {shape.num_bytes / GIB:.2f} GiB of weights")
    if isinstance(files, HuggingFaceFiles) and kind not in FAMILIES:
        finding = replace(finding, level="note", text=f"{finding.text}; this family was not compared with transformers")
    return [finding, _licence(source)], shape


def inspect_for(params: Params) -> HuggingFaceFiles | ModelArgs:
    """The files of the source model. Raises InputError if the files cannot be used, or a setting does not fit them."""
    files = inspect_source_model(SOURCE_MODELS / params.model, params.llama_version)
    blocks = model_shape(files, SOURCE_MODELS / params.model).blocks
    layers = dict.fromkeys(layer for block in blocks for layer in block)
    targets = [] if params.lora.target_modules == ALL_LINEAR else params.lora.target_modules
    unknown = [target for target in targets if not any(is_target(layer, target) for layer in layers)]
    if unknown:
        names = ", ".join(layer.rpartition(".")[2] for layer in layers)
        raise InputError(
            f"lora.target_modules: {unknown[0]} is not a linear layer of {params.model}. Use some of {names}, or "
            f"{ALL_LINEAR}."
        )
    if isinstance(files, HuggingFaceFiles) and files.is_4bit:
        _require_same_quantization(params, files)
    context_length = _context_length(params, files)
    if context_length is not None:
        require_in_context(context_length, {"compute.seq_length": params.compute.seq_length})
        require_in_context(context_length, params.sample.num_tokens)
    return files


def _context_length(params: Params, files: HuggingFaceFiles | ModelArgs) -> int | None:
    """The context of the source model in tokens. None: only transformers knows it, so convert writes it."""
    if isinstance(files, HuggingFaceFiles):
        return files.config.get("max_position_embeddings")
    return VERSIONS[require_version(SOURCE_MODELS / params.model, params.llama_version)].context_length


def inspect_source_model(source: Path, llama_version: str | None) -> HuggingFaceFiles | ModelArgs:
    """All checks of a source model that need neither torch nor transformers. Returns its settings and sizes.

    Raises InputError if the model cannot be used. The message has the file or key, and the remedy.
    """
    if find_layout(source) == "huggingface":
        files = read_huggingface(source)
        require_tokenizer_version(source, llama_version)
        return files
    version = require_version(source, llama_version)
    args = read_model_args(source / "params.json", version)
    require_tokenizer_kind(source / "tokenizer.model", version)
    if not (source / "consolidated.00.pth").is_file():
        raise InputError(
            f"{source / 'consolidated.00.pth'}: the file is missing. Download all shards of the source model."
        )
    require_no_pointer(source / "consolidated.00.pth")
    return args


def _require_same_quantization(params: Params, files: HuggingFaceFiles) -> None:
    """A model that is stored in 4 bits keeps its quantization, so the settings must be the same."""
    stored = files.config["quantization_config"]
    settings = {
        "bits": 4,
        "bnb_4bit_quant_type": stored.get("bnb_4bit_quant_type", "fp4"),
        "bnb_4bit_use_double_quant": stored.get("bnb_4bit_use_double_quant", False),
    }
    for key, value in settings.items():
        current = getattr(params.quantization, key)
        if current != value:
            raise InputError(
                f"quantization.{key} is {current}, but the source model {params.model} is stored with {value}. "
                f"Set it to {value}, or use the unquantized model."
            )


def _licence(folder: Path) -> Finding:
    licences = find_licences(folder)
    if licences:
        return Finding("ok", "licence", f"{', '.join(licences)} in {folder}")
    return Finding("note", "licence", f"{folder} has no licence file. Check the terms before you share a model.")
