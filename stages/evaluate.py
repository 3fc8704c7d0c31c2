"""evaluate: models/base, models/adapter, data/split/test.jsonl -> metrics/eval.json, metrics/eval_documents.csv"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from pdf2lora.comparison import Comparison, commit_of, compare, documents_at, in_words
from pdf2lora.corpus import Document, read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.forward import build_forward, choose_kernels
from pdf2lora.machine import machine_metrics
from pdf2lora.manifest import require_whole
from pdf2lora.model import load_adapter, load_base
from pdf2lora.orphans import after_orphans
from pdf2lora.params import Params, read_params
from pdf2lora.perplexity import Nats, TextSize, bootstrap, nats_per_document, summary
from pdf2lora.runtime import project_root, whole_file, write_json
from pdf2lora.tokens import Encoder, Window

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/split/test.jsonl")
METRICS = Path("metrics/eval.json")
DOCUMENTS = Path("metrics/eval_documents.csv")
DIGITS = 6  # after the point: more would be noise of the processor's arithmetic


@report_input_errors
@after_orphans
def main() -> None:
    params = read_params()
    require_whole(BASE, made_by="convert")
    earlier = earlier_documents(params.evaluate.compare_to)
    encoder = Encoder.of(BASE)
    encoder.require_context(params.train.seq_length)
    documents = read_documents(TEST)
    sizes, looks = windows_of(documents, encoder, params)

    with (
        machine_metrics("evaluate"),
        tqdm(total=2 * len(looks), desc="evaluate", unit="window", disable=None) as progress,
    ):
        kernels = choose_kernels(params.train, params.quantization, params.lora)
        model = load_adapter(load_base(BASE, params.quantization, params.train), ADAPTER)
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
    with whole_file(DOCUMENTS) as partial:
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


def windows_of(documents: list[Document], encoder: Encoder, params: Params) -> tuple[list[TextSize], list[Window]]:
    """What the nats of each document are divided by, and the windows that score all of its tokens."""
    encoded = encoder.encode([document.text for document in documents])
    sizes = [
        TextSize(tokens=len(tokens), bytes=len(document.text.encode()), words=len(document.text.split()))
        for document, tokens in zip(documents, encoded, strict=True)
    ]
    looks = encoder.windows(encoded, seq_length=params.train.seq_length, stride=params.evaluate.stride)
    return sizes, looks


def result(base: Nats, adapted: Nats, sizes: list[TextSize], *, num_samples: int, seed: int) -> dict[str, object]:
    """The tree of metrics/eval.json: base, adapted, improvement, what was counted."""
    intervals = bootstrap(base, adapted, sizes, num_samples=num_samples, seed=seed)
    models = {"base": summary(base, sizes), "adapted": summary(adapted, sizes)}

    def low_and_high(name: str) -> dict[str, float]:
        low, high = intervals[name]
        return {"low_95": round(low, DIGITS), "high_95": round(high, DIGITS)}

    tree: dict[str, object] = {
        name: {key: round(value, DIGITS) for key, value in numbers.items()} | low_and_high(name)
        for name, numbers in models.items()
    }
    improvement = 1 - models["adapted"]["perplexity"] / models["base"]["perplexity"]
    return tree | {
        "improvement": {"share": round(improvement, DIGITS), **low_and_high("improvement")},
        "documents": len(sizes),
        "tokens": sum(size.tokens for size in sizes),
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
