"""The figures of the report, drawn from numbers. results.py and machine.py read the files."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pdf2lora.report.results import Curve
from pdf2lora.report.style import LIGHT, axes
from pdf2lora.report.templates import number

NUM_DOCUMENTS = 12  # best and worst documents in the figure of documents
MAX_BUDGETS = 1.15  # a memory model is drawn up to this multiple of the budget
LINE_COLOURS = (LIGHT["adapted"], LIGHT["base"], LIGHT["validation"], LIGHT["train"], LIGHT["ink"])

Figures = dict[str, Figure]


def over_steps(title: str, y_label: str, curves: Mapping[str, Curve], kept_step: int | None = None) -> Figure:
    """Draws each curve as a line over the optimizer steps. The validation curve has a mark at each point.

    kept_step: the step whose adapter train kept, as a vertical line.
    """
    with axes(title, "optimizer step", y_label) as (figure, area):
        for name, (steps, values) in curves.items():
            marker = "o" if name == "validation" or len(steps) == 1 else ""
            area.plot(steps, values, label=name, color=LIGHT.get(name, LIGHT["adapted"]), marker=marker, markersize=3.5)
        if kept_step is not None:
            area.axvline(kept_step, color=LIGHT["ink"], linewidth=1, linestyle="--", label="kept")
        if len(curves) > 1 or kept_step is not None:
            area.legend()
        area.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def batch_memory(probes: Sequence[dict[str, Any]], models: Mapping[str, dict[str, float]], budget_gib: float) -> Figure:
    """Draws the peak memory of each probe over its batch, the memory models and the budget.

    models: value of gradient_checkpointing -> fixed_gib and gib_per_sequence, if it has a memory model.
    """
    with axes("Memory of a training step", "sequences in the batch", "peak GiB") as (figure, area):
        names = dict.fromkeys(probe["gradient_checkpointing"] for probe in probes)
        for name, colour in zip(names, cycle(LINE_COLOURS), strict=False):
            of_name = [probe for probe in probes if probe["gradient_checkpointing"] == name]
            measured = [probe for probe in of_name if probe["peak_gib"] is not None]
            out_of_memory = [probe["batch"] for probe in of_name if probe["peak_gib"] is None]
            area.scatter(
                [probe["batch"] for probe in measured],
                [probe["peak_gib"] for probe in measured],
                s=28,
                color=[colour if probe["fits"] else LIGHT["bad"] for probe in measured],
                zorder=3,
            )
            area.scatter(
                out_of_memory, [budget_gib] * len(out_of_memory), s=36, marker="x", color=LIGHT["bad"], zorder=3
            )
            model = models[name]
            if "fixed_gib" in model:
                fixed, slope = model["fixed_gib"], model["gib_per_sequence"]
                largest = max(probe["batch"] for probe in of_name)
                limit = (MAX_BUDGETS * budget_gib - fixed) / slope if slope > 0 else largest
                ends = [0, max(0.0, min(largest, limit))]
                line = [fixed + slope * batch for batch in ends]
                area.plot(ends, line, color=colour, linestyle=":", label=name)
            else:
                area.scatter([], [], s=28, color=colour, label=name)
        area.axhline(budget_gib, color=LIGHT["ink"], linewidth=1, linestyle="--", label="budget")
        area.set_xlim(left=0)
        area.set_ylim(bottom=0)
        area.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def batch_bounds(probes: Sequence[dict[str, Any]], gradient_checkpointing: str) -> Figure:
    """Draws the probes with this gradient_checkpointing in their order, and the bounds of the search after each."""
    probes = [probe for probe in probes if probe["gradient_checkpointing"] == gradient_checkpointing]
    ceiling = max(probe["batch"] for probe in probes) + 1
    low, high, lows, highs = 0, ceiling, [], []
    for probe in probes:
        low = max(low, probe["batch"]) if probe["fits"] else low
        high = high if probe["fits"] else min(high, probe["batch"])
        lows.append(low)
        highs.append(high)
    numbers = list(range(1, len(probes) + 1))
    with axes("Bounds of the largest batch", "probe", "sequences in the batch") as (figure, area):
        area.fill_between(
            numbers, lows, highs, step="post", color=LIGHT["adapted"], alpha=0.15, label="possible", linewidth=0
        )
        for fits, label, marker in ((True, "fits", "o"), (False, "does not fit", "X")):
            points = [(n, p["batch"]) for n, p in zip(numbers, probes, strict=True) if p["fits"] == fits]
            if points:
                colour = LIGHT["adapted" if fits else "bad"]
                xs, ys = zip(*points, strict=True)
                area.scatter(xs, ys, s=36, marker=marker, color=colour, label=label, zorder=3)
        area.set_ylim(bottom=0)
        area.xaxis.set_major_locator(MaxNLocator(integer=True))
        area.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def perplexities(title: str, metrics: Mapping[str, Any]) -> Figure:
    """Draws the perplexity of each model with its 95% interval."""
    models = {"adapted": "adapted", "base": "base", "base_unquantized": "unquantized base"}
    rows = [(name, label) for name, label in models.items() if name in metrics]
    height = 0.9 + 0.4 * len(rows)
    with axes(title, "perplexity (lower is better)", "", height=height) as (figure, area):
        for row, (name, _) in enumerate(rows):
            numbers, colour = metrics[name], LIGHT.get(name, LIGHT["muted"])
            value = numbers["perplexity"]
            if numbers["low_95"] is not None:
                area.plot((numbers["low_95"], numbers["high_95"]), (row, row), color=colour, marker="|", markersize=8)
            area.plot(value, row, color=colour, marker="o", markersize=7)
            area.annotate(
                number(value), (value, row), xytext=(0, 8), textcoords="offset points", ha="center", color=colour
            )
        area.xaxis.set_major_formatter("{x:,g}")
        area.set_yticks(range(len(rows)), [label for _, label in rows])
        area.set_ylim(-0.5, len(rows) - 0.4)
        area.grid(axis="y", visible=False)
        return figure


def documents(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws base and adapted perplexity of each test document, or only of the best and the worst ones."""
    rows = sorted(rows, key=lambda row: row["adapted_perplexity"])
    title = "Each test document"
    if len(rows) > 2 * NUM_DOCUMENTS:
        rows = [*rows[:NUM_DOCUMENTS], *rows[-NUM_DOCUMENTS:]]
        title = f"The {NUM_DOCUMENTS} best and the {NUM_DOCUMENTS} worst test documents"
    with axes("", "perplexity, base to adapted", "", height=1.4 + 0.3 * len(rows)) as (figure, area):
        figure.suptitle(title, x=0.02, ha="left")  # the names leave too little width for a title of the axes
        for line, row in enumerate(rows):
            ends = row["base_perplexity"], row["adapted_perplexity"]
            area.plot(ends, (line, line), color=LIGHT["grid"], linewidth=3, solid_capstyle="round", zorder=1)
        for name in ("base", "adapted"):
            values = [row[f"{name}_perplexity"] for row in rows]
            area.scatter(values, range(len(rows)), s=30, color=LIGHT[name], label=name, zorder=2)
        area.xaxis.set_major_formatter("{x:,g}")
        area.set_yticks(range(len(rows)), [shortened(row["id"]) for row in rows])
        area.set_ylim(len(rows) - 0.4, -0.6)
        area.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def improvement(rows: Sequence[dict[str, Any]], metrics: Mapping[str, Any]) -> Figure:
    """Draws a histogram of the improvement by document, and the improvement over all documents with its interval."""
    with axes("Improvement by document", "improvement", "documents") as (figure, area):
        area.hist([row["improvement"] for row in rows], bins=20, color=LIGHT["adapted"], alpha=0.7)
        total = metrics["improvement"]
        if total["low_95"] is not None:
            area.axvspan(total["low_95"], total["high_95"], color=LIGHT["ink"], alpha=0.12, linewidth=0, label="95%")
        area.axvline(total["share"], color=LIGHT["ink"], linewidth=1.2, label="all documents")
        area.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        area.yaxis.set_major_locator(MaxNLocator(integer=True))
        area.legend()
        return figure


def over_time(title: str, y_label: str, curves: Mapping[str, Curve]) -> Figure:
    """Draws each curve as a line over the seconds of a stage."""
    with axes(title, "seconds", y_label, height=2.6) as (figure, area):
        for colour, (name, (seconds, values)) in zip(cycle(LINE_COLOURS), curves.items(), strict=False):
            area.plot(seconds, values, label=name, color=colour, linewidth=1.2)
        area.set_ylim(bottom=0)
        if len(curves) > 1:
            area.legend()
        return figure


def shortened(name: str, length: int = 30) -> str:
    """Shortens a document's path: removes first its folders, then the middle of its name."""
    name = name.removesuffix(".pdf")
    while len(name) > length and "/" in name:
        name = name.partition("/")[2]
    half = length // 2
    return name if len(name) <= length else f"{name[: length - half - 1]}…{name[-half:]}"
