"""export: models/base, models/adapter -> models/merged/, models/adapter_release/

models/merged is an ordinary model for transformers, vLLM and llama.cpp's converter: the unquantized base with the
merged adapter. export measures its test perplexity. models/adapter_release is the adapter for other projects: it has
the tokenizer, a model card and the name of the base model. models/adapter stays as train wrote it, because dvc.lock
has its hash.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.evaluation.metrics import Metrics, model_metrics, scored_text
from pdf2lora.evaluation.scored_documents import read_test
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.unquantized import build_unquantized
from pdf2lora.model.device import device
from pdf2lora.model.initialization import INITIAL
from pdf2lora.model.kernel_choice import choose_exact_kernels
from pdf2lora.model.loading import read_config
from pdf2lora.params import Params, read_params
from pdf2lora.paths import ADAPTER, BASE, CORPORA, SOURCE_MODELS, SPLIT_DOCUMENTS, TOKENS
from pdf2lora.report.card import render_card
from pdf2lora.report.results import read_results
from pdf2lora.runtime.arguments import require_no_arguments
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.manifest import write_manifest
from pdf2lora.token_files import TokenFile
from pdf2lora.weights.merge import merge, read_adapter
from pdf2lora.weights.plain_adapter import write_plain_adapter

MERGED = Path("models/merged")
RELEASE = Path("models/adapter_release")
CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*")
GGUF_COMMANDS = f"""\
  python llama.cpp/convert_hf_to_gguf.py {MERGED} --outtype f16 --outfile {MERGED}-f16.gguf
  llama.cpp/build/bin/llama-quantize {MERGED}-f16.gguf {MERGED}-Q4_K_M.gguf Q4_K_M"""


@report_input_errors
def main() -> None:
    params = read_params()
    require_current_adapter()
    if not params.lora.reads_weights:
        export(params, ADAPTER)
        return
    with TemporaryDirectory() as folder:  # models/adapter belongs to a changed base, or corrects the quantization
        write_plain_adapter(ADAPTER, ADAPTER / INITIAL, Path(folder))
        export(params, Path(folder))


def export(params: Params, adapter: Path) -> None:
    """Writes both folders. adapter: an adapter of the unchanged base."""
    source = SOURCE_MODELS / params.model
    results = read_results(source, [CORPORA / params.corpus, source, SPLIT_DOCUMENTS, BASE, ADAPTER])
    licences = [source / name for name in results.licence_files]

    with atomic_directory(MERGED) as folder:
        with tqdm(total=len(read_adapter(adapter)), desc="export", unit="weight", disable=None) as progress:
            num_weights = merge(BASE, adapter, folder, progress.update)
        copy_files(licences, folder)
        merged = measure(folder, params)
        write_json(folder / "perplexity.json", {"merged": merged, "adapted": results.evaluation["adapted"]})
        card = render_card(results, params, merged=merged, is_merged=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder)
    with atomic_directory(RELEASE) as folder:
        write_release(adapter, folder, params.hub_id or params.model)
        copy_files(licences, folder)
        (folder / "README.md").write_text(render_card(results, params, merged=merged), encoding="utf-8")

    adapted, bits = results.evaluation["adapted"]["perplexity"], params.quantization.bits
    print(f"export: wrote the adapter with tokenizer and model card to {RELEASE}")
    if params.hub_id is None:
        print(f"export: set models.{params.model}.hub_id to name the base model on the Hugging Face hub")
    print(
        f"export: wrote {MERGED}: {num_weights} merged weights in {results.convert['dtype']}; "
        f"test perplexity {merged['perplexity']:.2f} (merged), {adapted:.2f} ({bits}-bit base with the adapter)"
    )
    print(f"export: to GGUF with llama.cpp:\n{GGUF_COMMANDS}")


def write_release(adapter: Path, folder: Path, base_name: str) -> None:
    """The adapter with the name of its base model and the base model's tokenizer.

    models/adapter names models/base, a folder that other projects do not have.
    """
    copy_files([file for file in sorted(adapter.iterdir()) if file.name != CONFIG], folder)
    copy_files([file for pattern in TOKENIZER_FILES for file in sorted(BASE.glob(pattern))], folder)
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"base_model_name_or_path": base_name})


def require_current_adapter() -> None:
    """Raises InputError if the adapter or its perplexity does not belong to the current params.yaml, code and data."""
    if not (ADAPTER / "adapter_model.safetensors").exists():
        raise InputError(f"{ADAPTER} has no adapter. Run dvc repro, or get one with dvc pull.")
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet", "evaluate"], capture_output=True)
    if status.returncode != 0:
        raise InputError(
            f"{ADAPTER} does not belong to the current params.yaml, code and data (dvc status evaluate lists the "
            "changes). Run dvc repro first."
        )


def copy_files(files: list[Path], folder: Path) -> None:
    """Copies contents without file modes: safetensors makes files that only their owner can read."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def measure(model: Path, params: Params) -> Metrics:
    """The test metrics of an unquantized model, computed as in evaluate."""
    texts = [scored_text(document.text, tokens, group) for document, tokens, group in read_test()]
    windows = TokenFile.open(TOKENS, "test").windows(
        seq_length=params.compute.seq_length, stride=params.evaluate.stride
    )
    kernels = choose_exact_kernels(params.compute, params.quantization, params.lora, read_config(model))
    with tqdm(total=len(windows), desc="perplexity", unit="window", disable=None) as progress:
        nats = nats_per_document(
            build_unquantized(model, params.quantization, params.compute, kernels),
            windows,
            num_documents=len(texts),
            per_device_batch=params.evaluate.per_device_batch,
            processes=Processes.alone(device()),
            progress=progress.update,
        )
    return model_metrics(nats, texts)


if __name__ == "__main__":
    require_no_arguments(__doc__)
    main()
