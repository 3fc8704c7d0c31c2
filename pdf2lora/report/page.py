"""reports/index.html: the results of one run as one page, and what the machine did as a part that the page takes in.

The page holds only what a repeated run gives again, so that DVC can keep it with each experiment. What one machine
measured (seconds, watts, GPU memory) is in machine.js beside it, which carries the key of the run that it belongs to:
the page shows it where the keys agree, and says so where they do not.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pdf2lora.params import Params
from pdf2lora.report import figures, style
from pdf2lora.report.results import Results, read_columns

TEMPLATES = Path(__file__).parent
NUM_EXTREMES = 5  # documents at either end of the tables
MIN_SAMPLES = 10  # of a curve over time: a stage of fewer seconds has none

# key of an entry of machine.json, its title, digits after the point
MEASURED = (  # name in metrics/machine.json, title, digits after the point
    ("seconds", "seconds, without imports", 1),
    ("seconds_to_first_step", "seconds from the start, imports too, to the first step", 1),
    ("tokens_per_s", "tokens/s", 0),
    ("step_tokens_per_s", "tokens/s of the median step", 0),
    ("model_flops_utilization", "share of the GPU's FLOP/s", 2),
    ("peak_process_memory_gib", "peak GiB of the process", 2),
    ("peak_gpu_memory_gib", "peak GiB of the GPU", 2),
    ("peak_allocated_gib", "peak GiB of tensors", 2),
    ("mean_gpu_utilization_percent", "mean GPU utilization, %", 0),
    ("energy_wh", "energy, Wh", 2),
    ("joules_per_million_tokens", "joules a million tokens", 0),
)

Figures = dict[str, Figure]


def environment() -> Environment:
    """Templates beside this file; HTML is escaped, a missing name is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": lambda share, digits=1: f"{share:.{digits}%}", "number": number, "size": size}
    made.filters["setting"] = setting
    return made


def number(value: float | int | None, digits: int = 2) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def setting(value: Any) -> str:
    """As params.yaml writes it: true, 30 for 30.0; a list without its brackets."""
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def size(num_bytes: int) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= bytes_:
            return f"{num_bytes / bytes_:.1f} {unit}"
    return f"{num_bytes} bytes"


def result_figures(results: Results) -> Figures:
    """name -> figure, of all that there is something to draw of."""
    curves, batch = results.curves, results.batch
    drawn: Figures = {}
    for name, title, y_label in (("loss", "Loss", "nats a token"), ("perplexity", "Perplexity", "perplexity")):
        sides = {s: curves[f"{s}/{name}"] for s in ("train", "validation") if f"{s}/{name}" in curves}
        if sides:
            drawn[name] = figures.over_steps(title, y_label, sides)
    for name, title, y_label in (
        ("learning_rate", "Learning rate", "learning rate"),
        ("gradient_norm", "Gradient norm", "norm before clipping"),
        ("gpu_memory_gib", "Allocated GPU memory", "peak GiB so far"),
    ):
        if name in curves:
            drawn[name] = figures.over_steps(title, y_label, {name: curves[name]})
    probes = batch.get("probes", [])
    if probes:
        drawn["batch_memory"] = figures.batch_memory(probes, memory_models(batch), batch["budget_gib"])
        drawn["batch_bounds"] = figures.batch_bounds(probes, chosen_mode(batch))
    drawn["test_perplexity"] = figures.test_perplexity(results.evaluation)
    drawn["documents"] = figures.documents(results.test_documents)
    if len(results.test_documents) > 2 * figures.NUM_DOCUMENTS:
        drawn["improvement"] = figures.improvement(results.test_documents, results.evaluation)
    return drawn


def memory_models(batch: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Way of checkpointing -> fixed_gib, gib_per_sequence, largest_batch."""
    return {mode: dict(model) for mode, model in batch.get("modes", {}).items()}


def chosen_mode(batch: Mapping[str, Any]) -> str:
    """The way of checkpointing that train uses, where its probes are told apart by it."""
    return str(batch["gradient_checkpointing"]) if "gradient_checkpointing" in batch["probes"][0] else ""


def render_page(results: Results, params: Params, svgs: Mapping[str, str], run: str) -> str:
    """The whole of index.html; `run`: the key that machine.js must carry."""
    rows = sorted(results.test_documents, key=lambda row: row["adapted_perplexity"])
    left_out = defaultdict(list)
    for document in results.documents:
        if document.reason is not None:
            left_out[document.reason].append(document)
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            r=results,
            params=params,
            settings=params.model_dump(exclude={"models"}),
            run=run,
            figures={name: Markup(svg) for name, svg in svgs.items()},
            palette={theme: Markup(style.variables(number)) for number, theme in enumerate(("light", "dark"))},
            left_out=dict(sorted(left_out.items())),
            kept=[document for document in results.documents if document.reason is None],
            modes=memory_models(results.batch),
            best=rows[:NUM_EXTREMES],
            worst=rows[max(NUM_EXTREMES, len(rows) - NUM_EXTREMES) :][::-1],
            samples=results.samples,
            num_steps=int(max(max(steps) for steps, _ in results.curves.values())) if results.curves else None,
        )
    )


def machine_figures(curves: Mapping[str, Mapping[str, list[float]]]) -> Figures:
    """Memory, and a GPU's utilization and power, over the seconds of each stage that took long enough for a curve."""
    drawn: Figures = {}
    for stage, columns in curves.items():
        if len(columns.get("seconds", ())) < MIN_SAMPLES:
            continue
        groups = {
            "memory": ("Memory", "GiB", {"process_memory_gib": "process", "gpu_memory_gib": "GPU"}),
            "utilization": ("GPU utilization", "percent", {"gpu_utilization_percent": "utilization"}),
            "power": ("GPU power", "watts", {"gpu_power_w": "power"}),
        }
        for group, (title, unit, names) in groups.items():
            lines = {label: (columns["seconds"], columns[name]) for name, label in names.items() if name in columns}
            if lines:
                drawn[f"{stage}_{group}"] = figures.over_time(f"{title}, {stage}", unit, lines)
    return drawn


def read_machine(metrics: Path, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """metrics/machine.json and the curves in metrics/machine/; empty where nothing was measured here."""
    machine = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    return machine, {
        stage: read_columns(folder / f"{stage}.tsv") for stage in machine if (folder / f"{stage}.tsv").exists()
    }


def with_energy(machine: Mapping[str, Any], curves: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """The entries of machine.json, with energy_wh and mean_gpu_utilization_percent where a GPU was sampled.

    The energy is what the GPU counted; where it counts none, the integral of its power.
    """
    completed = dict(machine)
    for stage, columns in curves.items():
        seconds, watts = columns["seconds"], columns.get("gpu_power_w", [])
        joules = completed[stage].get("joules")
        if joules is None and len(watts) > 1:  # trapezoids between the samples
            spans = zip(seconds[1:], seconds, watts[1:], watts, strict=False)
            joules = math.fsum((end - begin) * (high + low) / 2 for end, begin, high, low in spans)
        if joules is not None:
            completed[stage] = completed[stage] | {"energy_wh": joules / 3600}
        utilization = columns.get("gpu_utilization_percent", [])
        if utilization:
            mean = math.fsum(utilization) / len(utilization)
            completed[stage] = completed[stage] | {"mean_gpu_utilization_percent": mean}
    return completed


def render_machine(machine: Mapping[str, Any], svgs: Mapping[str, str], run: str) -> str:
    """machine.js: a call of the page's function with the run's key and a piece of HTML."""
    stages = {name: entry for name, entry in machine.items() if name != "machine"}
    html = (
        environment()
        .get_template("machine.html.jinja")
        .render(
            machine=machine.get("machine", {}),
            stages=stages,
            measured=[row for row in MEASURED if any(entry.get(row[0]) is not None for entry in stages.values())],
            figures={name: Markup(svg) for name, svg in svgs.items()},
        )
    )
    return f"showMachine({json.dumps(run)}, {json.dumps(html)});\n"
