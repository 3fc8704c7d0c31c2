"""evaluate: models/base, models/adapter, data/split/test.jsonl -> metrics/eval.json, metrics/eval_documents.csv"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from pdf2lora.documents.records import Document, read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.comparison import Comparison, commit_of, compare, documents_at, in_words
from pdf2lora.evaluation.intervals import DIGITS, Nats, result
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.evaluation.windows import TextSize, document_windows
from pdf2lora.model.forward import build_forward
from pdf2lora.model.kernel_choice import choose_kernels
from pdf2lora.model.loading import load_adapter, load_base
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
    require_intact(BASE, made_by="convert")
    earlier = earlier_documents(params.evaluate.compare_to)
    encoder = Encoder.load(BASE)
    encoder.require_context(params.compute.seq_length)
    documents = read_documents(TEST)
    sizes, looks = document_windows(documents, encoder, params)

    with (
        machine_metrics("evaluate"),
        tqdm(total=2 * len(looks), desc="evaluate", unit="window", disable=None) as progress,
    ):
        kernels = choose_kernels(params.compute, params.quantization, params.lora)
        model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)
        forward = build_forward(model, "fused" if kernels == "fp8" else kernels)  # a test in fp8 would be approximate

        def score() -> Nats:
            return nats_per_document(
                forward,
                looks,
                num_documents=len(documents),
                per_device_batch=params.evaluate.per_device_batch,
                progress=progress.update,
            )

        adapted = score()
        with model.disable_adapter():
            base = score()
    table = per_document(documents, sizes, base, adapted)
    metrics = result(base, adapted, sizes, num_samples=params.evaluate.bootstrap_samples, seed=params.evaluate.seed)
    line = summary_line(metrics)
    if earlier is not None:
        commit, table_then = earlier
        comparison = compare(
            table, table_then, num_samples=params.evaluate.bootstrap_samples, seed=params.evaluate.seed
        )
        metrics["comparison"] = comparison_metrics(params.evaluate.compare_to, commit, comparison)
        line += f"\nevaluate: against {in_words(params.evaluate.compare_to, commit, comparison)}"

    write_json(METRICS, metrics)
    with atomic_write(DOCUMENTS) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
    print(line)


def earlier_documents(compare_to: str) -> tuple[str, pd.DataFrame] | None:
    """The commit of evaluate.compare_to and its table of documents; None for 'none'."""
    if compare_to == "none":
        return None
    commit = commit_of(compare_to, project_root())
    return commit, documents_at(commit, project_root())


def comparison_metrics(compare_to: str, commit: str, comparison: Comparison) -> dict[str, object]:
    return {
        "with": compare_to,
        "commit": commit,
        "documents": comparison.documents,
        "left_out": comparison.left_out,
        "improved": comparison.improved,
        "perplexity_before": round(comparison.before, DIGITS),
        "perplexity_now": round(comparison.now, DIGITS),
        "improvement": round(comparison.improvement, DIGITS),
        "low_95": round(comparison.low, DIGITS),
        "high_95": round(comparison.high, DIGITS),
        "differs": comparison.differs,
    }


def per_document(documents: list[Document], sizes: list[TextSize], base: Nats, adapted: Nats) -> pd.DataFrame:
    """A row for each test document, its perplexity under both models."""
    table = pd.DataFrame([{"id": document.id, **vars(size)} for document, size in zip(documents, sizes, strict=True)])
    for name, nats in (("base", base), ("adapted", adapted)):
        table[f"{name}_perplexity"] = np.exp(nats / table["tokens"]).round(DIGITS)
    table["improvement"] = (1 - table["adapted_perplexity"] / table["base_perplexity"]).round(DIGITS)
    return table.sort_values("id")


def summary_line(metrics: dict[str, object]) -> str:
    base, adapted, improvement = (metrics[name] for name in ("base", "adapted", "improvement"))
    assert isinstance(base, dict)
    assert isinstance(adapted, dict)
    assert isinstance(improvement, dict)
    return (
        f"evaluate: test perplexity {base['perplexity']:.2f} (base) -> {adapted['perplexity']:.2f} (adapted), "
        f"{improvement['share']:.1%} lower [{improvement['low_95']:.1%}, {improvement['high_95']:.1%}]"
    )


if __name__ == "__main__":
    main()
