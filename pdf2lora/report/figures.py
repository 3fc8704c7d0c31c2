"""The report's figures, each drawn from the numbers in metrics/. They know no file: results.py reads, these draw."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pdf2lora.report.results import Curve
from pdf2lora.report.style import LIGHT, axes

NUM_DOCUMENTS = 12  # of the documents' figure, from either end
LINE_ENDS = 1.15  # budgets: a memory model is drawn no further
MODE_COLOURS = (LIGHT["adapted"], LIGHT["base"], LIGHT["validation"], LIGHT["train"], LIGHT["ink"])


def over_steps(title: str, y_label: str, curves: Mapping[str, Curve]) -> Figure:
    """A line for each curve over the optimizer steps; train as it was logged, validation with its looks marked."""
    with axes(title, "optimizer step", y_label) as (figure, area):
        for name, (steps, values) in curves.items():
            marker = "o" if name == "validation" or len(steps) == 1 else ""
            area.plot(steps, values, label=name, color=LIGHT.get(name, LIGHT["adapted"]), marker=marker, markersize=3.5)
        if len(curves) > 1:
            area.legend()
        area.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def batch_memory(probes: Sequence[dict[str, Any]], modes: Mapping[str, dict[str, float]], budget_gib: float) -> Figure:
    """Peak memory of each probe over its batch, the memory model through them, the budget that they must keep."""
    with axes("Memory of a training step", "sequences in the batch", "peak GiB") as (figure, area):
        colours = dict(zip(_modes_of(probes), cycle(MODE_COLOURS), strict=False))
        for mode, colour in colours.items():
            ended = [p for p in probes if _mode(p) == mode and p["peak_gib"] is not None]
            died = [p["batch"] for p in probes if _mode(p) == mode and p["peak_gib"] is None]
            area.scatter(
                [p["batch"] for p in ended],
                [p["peak_gib"] for p in ended],
                s=28,
                color=[colour if p["fits"] else LIGHT["bad"] for p in ended],
                zorder=3,
            )
            area.scatter(died, [budget_gib] * len(died), s=36, marker="x", color=LIGHT["bad"], zorder=3)
            model = modes.get(mode, {})
            if "fixed_gib" in model and "gib_per_sequence" in model:
                fixed, slope = model["fixed_gib"], model["gib_per_sequence"]
                largest = max(p["batch"] for p in probes if _mode(p) == mode)
                above = (LINE_ENDS * budget_gib - fixed) / slope if slope > 0 else largest
                ends = [0, max(0.0, min(largest, above))]
                line = [fixed + slope * batch for batch in ends]
                area.plot(ends, line, color=colour, linestyle=":", label=mode or "memory model")
            elif mode:
                area.scatter([], [], s=28, color=colour, label=mode)
        area.axhline(budget_gib, color=LIGHT["ink"], linewidth=1, linestyle="--", label="budget")
        area.set_xlim(left=0)
        area.set_ylim(bottom=0)
        area.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def batch_bounds(probes: Sequence[dict[str, Any]], mode: str) -> Figure:
    """The probes of one mode in their order, and between which bounds the answer lay after each."""
    probes = [probe for probe in probes if _mode(probe) == mode]
    ceiling = max(probe["batch"] for probe in probes) + 1
    low, high, lows, highs = 0, ceiling, [], []
    for probe in probes:
        low = max(low, probe["batch"]) if probe["fits"] else low
        high = high if probe["fits"] else min(high, probe["batch"])
        lows.append(low)
        highs.append(high)
    numbers = list(range(1, len(probes) + 1))
    with axes("The bounds close in", "probe", "sequences in the batch") as (figure, area):
        area.fill_between(
            numbers, lows, highs, step="post", color=LIGHT["adapted"], alpha=0.15, label="still open", linewidth=0
        )
        for fits, label, marker in ((True, "fits", "o"), (False, "does not fit", "X")):
            drawn = [(n, p["batch"]) for n, p in zip(numbers, probes, strict=True) if p["fits"] == fits]
            if drawn:
                colour = LIGHT["adapted" if fits else "bad"]
                xs, ys = zip(*drawn, strict=True)
                area.scatter(xs, ys, s=36, marker=marker, color=colour, label=label, zorder=3)
        area.set_ylim(bottom=0)
        area.xaxis.set_major_locator(MaxNLocator(integer=True))
        area.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def test_perplexity(metrics: Mapping[str, Any]) -> Figure:
    """Both perplexities with their 95% intervals."""
    with axes("Test perplexity", "perplexity (lower is better)", "", height=1.7) as (figure, area):
        for row, name in enumerate(("adapted", "base")):
            numbers = metrics[name]
            value = numbers["perplexity"]
            area.errorbar(
                value,
                row,
                xerr=[[value - numbers["low_95"]], [numbers["high_95"] - value]],
                fmt="o",
                color=LIGHT[name],
                capsize=4,
                markersize=7,
            )
            area.annotate(
                f"{value:,.2f}", (value, row), xytext=(0, 8), textcoords="offset points", ha="center", color=LIGHT[name]
            )
        area.xaxis.set_major_formatter("{x:,g}")
        area.set_yticks([0, 1], ["adapted", "base"])
        area.set_ylim(-0.5, 1.6)
        area.grid(axis="y", visible=False)
        return figure


def documents(rows: Sequence[dict[str, Any]]) -> Figure:
    """How each test document's perplexity changed, the best adapted one at the top; of many, both ends."""
    rows = sorted(rows, key=lambda row: row["adapted_perplexity"])
    title = "Each test document"
    if len(rows) > 2 * NUM_DOCUMENTS:
        rows = [*rows[:NUM_DOCUMENTS], *rows[-NUM_DOCUMENTS:]]
        title = f"The {NUM_DOCUMENTS} best and the {NUM_DOCUMENTS} worst test documents"
    with axes("", "perplexity, base to adapted", "", height=1.4 + 0.3 * len(rows)) as (figure, area):
        figure.suptitle(title, x=0.02, ha="left")  # over the names too, which leave the axes little width
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
    """How many test documents became how much better, with the improvement over all and its interval."""
    with axes("Improvement by document", "perplexity lower by", "documents") as (figure, area):
        area.hist([row["improvement"] for row in rows], bins=20, color=LIGHT["adapted"], alpha=0.7)
        total = metrics["improvement"]
        area.axvspan(total["low_95"], total["high_95"], color=LIGHT["ink"], alpha=0.12, linewidth=0, label="95%")
        area.axvline(total["share"], color=LIGHT["ink"], linewidth=1.2, label="all documents")
        area.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        area.yaxis.set_major_locator(MaxNLocator(integer=True))
        area.legend()
        return figure


def over_time(title: str, y_label: str, curves: Mapping[str, Curve]) -> Figure:
    """What the machine did while a stage ran."""
    with axes(title, "seconds", y_label, height=2.6) as (figure, area):
        for colour, (name, (seconds, values)) in zip(cycle(MODE_COLOURS), curves.items(), strict=False):
            area.plot(seconds, values, label=name, color=colour, linewidth=1.2)
        area.set_ylim(bottom=0)
        if len(curves) > 1:
            area.legend()
        return figure


def shortened(name: str, length: int = 30) -> str:
    """A document's path without the folders, then without the middle, that there is no room for."""
    name = name.removesuffix(".pdf")
    while len(name) > length and "/" in name:
        name = name.partition("/")[2]
    half = length // 2
    return name if len(name) <= length else f"{name[: length - half - 1]}…{name[-half:]}"


def _mode(probe: Mapping[str, Any]) -> str:
    return str(probe.get("gradient_checkpointing", ""))


def _modes_of(probes: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_mode(probe) for probe in probes))
