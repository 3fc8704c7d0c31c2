"""evaluate: models/base, models/adapter, data/split/test.jsonl -> metrics/eval.json, metrics/eval_documents.csv

It scores the test documents and the general text with the unquantized base, the quantized base and the adapted model,
and writes samples of their text to data/samples.json.
"""

from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.comparison import compare, comparison_line, comparison_metrics, parse_table, require_pairs
from pdf2lora.evaluation.general import read_general
from pdf2lora.evaluation.intervals import Nats
from pdf2lora.evaluation.metrics import Scores, document_table, evaluation_metrics, summary_lines
from pdf2lora.evaluation.revisions import read_documents_at, resolve_commit
from pdf2lora.evaluation.samples import sample_documents
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.unquantized import load_unquantized
from pdf2lora.evaluation.windows import text_windows
from pdf2lora.model.capabilities import choose_kernels
from pdf2lora.model.forward import Forward, build_forward
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import read_params
from pdf2lora.runtime.files import atomic_write, write_json
from pdf2lora.runtime.inputs import require_inputs
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
SAMPLES = Path("data/samples.json")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    settings, samples = params.evaluate, params.sample
    require_inputs(BASE, ADAPTER, TEST)
    require_intact(BASE, made_by="convert")
    baseline = None
    if settings.compare_to != "none":
        commit = resolve_commit(settings.compare_to, project_root())
        baseline = parse_table(read_documents_at(commit, project_root()))
    encoder = Encoder.of(BASE)
    encoder.require_context(params.compute.seq_length)
    encoder.require_context(samples.prompt_tokens + samples.max_new_tokens, key="sample.max_new_tokens")
    documents = read_documents(TEST)
    texts = [document.text for document in documents] + read_general()
    sizes, windows = text_windows(texts, encoder, params)
    scores_unquantized = settings.unquantized_base and params.quantization.bits < 16

    with (
        machine_metrics("evaluate"),
        tqdm(
            total=(3 if scores_unquantized else 2) * len(windows), desc="evaluate", unit="window", disable=None
        ) as bar,
    ):

        def score(forward: Forward) -> Nats:
            return nats_per_document(
                forward,
                windows,
                num_documents=len(texts),
                per_device_batch=settings.per_device_batch,
                progress=bar.update,
            )

        base_unquantized = None
        if scores_unquantized:
            unquantized = load_unquantized(BASE, params.quantization, params.compute)
            base_unquantized = score(build_forward(unquantized, "reference"))
            del unquantized  # it leaves the memory before the quantized model is loaded
        kernels = choose_kernels(params.compute, params.quantization, params.lora)
        model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)
        forward = build_forward(model, "fused" if kernels == "fp8" else kernels)  # fp8 would approximate the nats
        adapted = score(forward)
        with model.disable_adapter():
            base = score(forward)
        sampled = sample_documents(model, encoder, documents[: samples.num_documents], samples)

    scores = Scores(base, adapted, base_unquantized)
    test, general = slice(len(documents)), slice(len(documents), None)
    table = document_table([document.id for document in documents], sizes[test], scores.part(test))
    metrics = evaluation_metrics(scores.part(test), sizes[test], scores.part(general), sizes[general])
    lines = summary_lines(metrics, params.quantization.bits)
    if baseline is not None:
        comparison = require_pairs(compare(table, baseline))
        metrics["comparison"] = comparison_metrics(settings.compare_to, commit, comparison)
        lines.append(comparison_line(settings.compare_to, commit, comparison))

    write_json(METRICS, metrics)
    write_json(SAMPLES, sampled)
    with atomic_write(DOCUMENTS) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
    print(*(f"evaluate: {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
