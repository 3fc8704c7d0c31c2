"""reports/index.html: the results of one run as one page.

The page has only numbers that a repeated run gives again. So DVC stores it with each experiment. The numbers of one
machine are on another page (machine.py).
"""

from collections.abc import Mapping

from markupsafe import Markup

from pdf2lora.params import Params
from pdf2lora.report import figures, style
from pdf2lora.report.results import Results
from pdf2lora.report.templates import get_template
from pdf2lora.report.warnings import run_warnings

NUM_EXTREMES = 5  # documents in the tables of the best and of the worst


def result_figures(results: Results) -> figures.Figures:
    """Draws the figures of the page, by name. A figure without data is left out."""
    curves, batch = results.curves, results.batch
    drawings: figures.Figures = {}
    for name, title, y_label in (("loss", "Loss", "nats per token"), ("perplexity", "Perplexity", "perplexity")):
        splits = {split: curves[f"{split}/{name}"] for split in ("train", "validation") if f"{split}/{name}" in curves}
        if splits:
            drawings[name] = figures.over_steps(title, y_label, splits, results.kept_step)
    for name, title, y_label in (
        ("learning_rate", "Learning rate", "learning rate"),
        ("gradient_norm", "Gradient norm", "norm before clipping"),
        ("gpu_memory_gib", "Allocated GPU memory", "peak GiB so far"),
    ):
        if name in curves:
            drawings[name] = figures.over_steps(title, y_label, {name: curves[name]})
    drawings["batch_memory"] = figures.batch_memory(batch["probes"], batch["modes"], batch["budget_gib"])
    drawings["batch_bounds"] = figures.batch_bounds(batch["probes"], batch["gradient_checkpointing"])
    drawings["test_perplexity"] = figures.perplexities("Test documents", results.evaluation)
    drawings["general_perplexity"] = figures.perplexities("General text", results.evaluation["general"])
    drawings["documents"] = figures.documents(results.test_documents)
    if len(results.test_documents) > 2 * figures.NUM_DOCUMENTS:
        drawings["improvement"] = figures.improvement(results.test_documents, results.evaluation)
    return drawings


def model_rows(results: Results, params: Params) -> list[tuple[str, str, str]]:
    """The models of metrics/eval.json: key, label, role of its colour."""
    rows = [("base", f"{params.quantization.bits}-bit base", "base"), ("adapted", "adapted", "adapted")]
    if "base_unquantized" in results.evaluation:
        rows.insert(0, ("base_unquantized", "unquantized base", "muted"))
    return rows


def render_page(results: Results, params: Params, svgs: Mapping[str, str]) -> str:
    """The content of reports/index.html.

    svgs: the SVG elements of result_figures by name.
    """
    rows = sorted(results.test_documents, key=lambda row: row["adapted_perplexity"])
    return get_template("page.html.jinja").render(
        r=results,
        params=params,
        settings=params.model_dump(exclude={"models"}),
        warnings=run_warnings(results, params),
        models=model_rows(results, params),
        figures={name: Markup(svg) for name, svg in svgs.items()},
        palette=style.palette(),
        best=rows[:NUM_EXTREMES],
        worst=rows[max(NUM_EXTREMES, len(rows) - NUM_EXTREMES) :][::-1],
        num_steps=int(max(max(steps) for steps, _ in results.curves.values())) if results.curves else None,
    )
