"""All checks of a source model that need neither torch nor transformers. check and doctor run them before any work."""

from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.weights.huggingface_files import HuggingFaceFiles, read_huggingface
from pdf2lora.weights.huggingface_tokenizer import require_tokenizer_version
from pdf2lora.weights.layout import find_layout
from pdf2lora.weights.params_json import ModelArgs, read_model_args, require_version
from pdf2lora.weights.tokenizer import require_tokenizer_kind


def inspect_source_model(source: Path, llama_version: str | None) -> HuggingFaceFiles | ModelArgs:
    """Checks the files in the folder `source`. Returns the model's settings and sizes.

    Raises:
        InputError: the model cannot be used. The message has the file or key, and the remedy.
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
    return args
