"""export: models/base, models/adapter -> models/merged/, models/adapter_release/

models/merged is a model like any other: the adapter merged into the base as it was before quantization, for
transformers, vLLM and llama.cpp's converter. Its test perplexity is measured beside the adapter's.
models/adapter_release is the adapter with its model card; models/adapter itself stays as train wrote it, since dvc.lock
has its hash.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.evaluation.intervals import Nats, result
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.windows import TextSize, document_windows
from pdf2lora.model.forward import build_forward
from pdf2lora.model.loading import load_base
from pdf2lora.params import Params, Quantization, read_params
from pdf2lora.report.card import render_card
from pdf2lora.report.results import read_results
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.manifest import write_manifest
from pdf2lora.tokens import Encoder
from pdf2lora.weights.merge import merge, read_adapter

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/split/test.jsonl")
MERGED = Path("models/merged")
RELEASE = Path("models/adapter_release")


@report_input_errors
def main() -> None:
    params = read_params()
    require_current_adapter()
    checkpoint = Path("models/source") / params.model
    results = read_results(
        checkpoint, [f"data/pdfs/{params.corpus}", str(checkpoint), "data/split", str(BASE), str(ADAPTER)]
    )
    licences = [checkpoint / name for name in results.licence_files]

    with atomic_directory(RELEASE) as folder:
        copy_files(sorted(ADAPTER.iterdir()), folder)
        (folder / "README.md").write_text(render_card(results, params), encoding="utf-8")
        copy_files(licences, folder)
    with atomic_directory(MERGED) as folder:
        with tqdm(total=len(read_adapter(ADAPTER)), desc="export", unit="weight", disable=None) as progress:
            num_weights = merge(BASE, ADAPTER, folder, progress.update)
        copy_files(licences, folder)
        perplexity = measure(folder, params)
        write_json(folder / "perplexity.json", {"merged": perplexity, "adapted": results.evaluation["adapted"]})
        (folder / "README.md").write_text(render_card(results, params, merged=perplexity), encoding="utf-8")
        write_manifest(folder)

    adapted, bits = results.evaluation["adapted"]["perplexity"], params.quantization.bits
    print(f"export: {RELEASE}: the adapter and its model card")
    print(
        f"export: {MERGED}: {num_weights} of the base's weights changed, in {results.convert['dtype']}; "
        f"test perplexity {perplexity['perplexity']:.2f} (merged), {adapted:.2f} (base in {bits} bits with the adapter)"
    )


def require_current_adapter() -> None:
    """The adapter and its perplexity must be those of params.yaml, or the card would tell of another run."""
    if not (ADAPTER / "adapter_model.safetensors").exists():
        raise InputError(f"{ADAPTER}: there is no adapter; run dvc repro first, or dvc pull one")
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet", "evaluate"], capture_output=True)
    if status.returncode != 0:
        raise InputError(
            f"{ADAPTER}: not the result of params.yaml, code and data as they are now (dvc status evaluate says what "
            "differs); run dvc repro first"
        )


def copy_files(files: list[Path], folder: Path) -> None:
    """Without their modes: safetensors leaves its files to their owner alone, and these are to be handed on."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def measure(model: Path, params: Params) -> dict[str, float]:
    """Test perplexity of an unquantized model, as evaluate measures it, with its 95% interval."""
    encoder = Encoder.load(model)
    documents = read_documents(TEST)
    sizes, looks = document_windows(documents, encoder, params)
    unquantized = Quantization(**(params.quantization.model_dump() | {"bits": 16}))
    with tqdm(total=len(looks), desc="perplexity", unit="window", disable=None) as progress:
        nats = nats_per_document(
            build_forward(load_base(model, unquantized, params.compute), "reference"),
            looks,
            num_documents=len(documents),
            per_device_batch=params.evaluate.per_device_batch,
            progress=progress.update,
        )
    return summary_of(nats, sizes, params)


def summary_of(nats: Nats, sizes: list[TextSize], params: Params) -> dict[str, float]:
    tree = result(nats, nats, sizes, num_samples=params.evaluate.bootstrap_samples, seed=params.evaluate.seed)
    numbers = tree["adapted"]
    assert isinstance(numbers, dict)
    return numbers


if __name__ == "__main__":
    main()
