"""evaluate: models/base, models/adapter, data/split/test.jsonl -> metrics/eval.json, metrics/eval_documents.csv"""

from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.comparison import compare, comparison_line, comparison_metrics, parse_table, require_pairs
from pdf2lora.evaluation.intervals import Nats
from pdf2lora.evaluation.metrics import document_table, evaluation_metrics, summary_line
from pdf2lora.evaluation.revisions import read_documents_at, resolve_commit
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.windows import document_windows
from pdf2lora.model.forward import build_forward
from pdf2lora.model.kernel_choice import choose_kernels
from pdf2lora.model.loading import load_adapter, load_base, read_config
from pdf2lora.params import read_params
from pdf2lora.runtime.files import atomic_write, write_json
from pdf2lora.runtime.manifest import require_intact
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.processes import single_instance
from pdf2lora.runtime.scratch import project_root
from pdf2lora.tokens import Encoder

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/split/test.jsonl")
METRICS = Path("metrics/eval.json")
DOCUMENTS = Path("metrics/eval_documents.csv")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    settings = params.evaluate
    require_intact(BASE, made_by="convert")
    baseline = None
    if settings.compare_to != "none":
        commit = resolve_commit(settings.compare_to, project_root())
        baseline = parse_table(read_documents_at(commit, project_root()))
    encoder = Encoder.load(BASE)
    encoder.require_context(params.compute.seq_length)
    documents = read_documents(TEST)
    sizes, windows = document_windows(documents, encoder, params)

    with (
        machine_metrics("evaluate"),
        tqdm(total=2 * len(windows), desc="evaluate", unit="window", disable=None) as progress,
    ):
        kernels = choose_kernels(params.compute, params.quantization, params.lora, read_config(BASE))
        model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)
        forward = build_forward(model, "fused" if kernels == "fp8" else kernels)  # fp8 would approximate the nats

        def score() -> Nats:
            return nats_per_document(
                forward,
                windows,
                num_documents=len(documents),
                per_device_batch=settings.per_device_batch,
                progress=progress.update,
            )

        adapted = score()
        with model.disable_adapter():
            base = score()

    table = document_table(documents, sizes, base, adapted)
    metrics = evaluation_metrics(base, adapted, sizes, settings)
    lines = [f"evaluate: {summary_line(metrics)}"]
    if baseline is not None:
        comparison = require_pairs(compare(table, baseline, num_samples=settings.bootstrap_samples, seed=settings.seed))
        metrics["comparison"] = comparison_metrics(settings.compare_to, commit, comparison)
        lines.append(f"evaluate: {comparison_line(settings.compare_to, commit, comparison)}")

    write_json(METRICS, metrics)
    with atomic_write(DOCUMENTS) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
