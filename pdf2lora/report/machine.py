"""reports/machine.html: time, throughput and memory of the stages on this machine.

These numbers differ from run to run. So they are not in reports/index.html, which is a DVC output and must have the
same bytes after a repeated run.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pdf2lora.params import Params
from pdf2lora.paths import MACHINE, MACHINE_CURVES
from pdf2lora.report import figures, style
from pdf2lora.report.results import read_columns
from pdf2lora.report.templates import get_template

MIN_SAMPLES = 10  # a shorter curve over time is not drawn
ROWS = (  # key of a stage in metrics/machine.json, title, digits after the decimal point
    ("seconds", "seconds, without imports", 1),
    ("seconds_to_first_step", "seconds to the first step, with imports", 1),
    ("tokens_per_s", "tokens/s", 0),
    ("step_tokens_per_s", "tokens/s of the median step", 0),
    ("model_flops_utilization", "model FLOP/s utilization", 2),
    ("peak_process_memory_gib", "peak GiB of the process", 2),
    ("peak_gpu_memory_gib", "peak GiB of the GPU", 2),
    ("peak_allocated_gib", "peak GiB of tensors", 2),
    ("mean_gpu_utilization_percent", "mean GPU utilization, %", 0),
)
CURVES = {  # name -> title, unit, column of metrics/machine/<stage>.tsv -> label
    "memory": ("Memory", "GiB", {"process_memory_gib": "process", "gpu_memory_gib": "GPU"}),
    "utilization": ("GPU utilization", "percent", {"gpu_utilization_percent": "utilization"}),
    "power": ("GPU power", "watts", {"gpu_power_w": "power"}),
}

Columns = Mapping[str, list[float]]


@dataclass(frozen=True)
class Measurements:
    machine: dict[str, Any]  # processor, GPU, versions of the libraries
    stages: dict[str, dict[str, Any]]
    curves: Mapping[str, Columns]  # stage -> seconds and measured columns


def read_measurements() -> Measurements:
    """Reads metrics/machine.json and the curves in metrics/machine. Empty if no stage ran on this machine."""
    stages = json.loads(MACHINE.read_text(encoding="utf-8")) if MACHINE.exists() else {}
    machine = stages.pop("machine", {})
    files = {stage: MACHINE_CURVES / f"{stage}.tsv" for stage in stages}
    curves = {stage: read_columns(file) for stage, file in files.items() if file.exists()}
    for stage, columns in curves.items():
        if utilization := columns.get("gpu_utilization_percent"):
            stages[stage]["mean_gpu_utilization_percent"] = math.fsum(utilization) / len(utilization)
    return Measurements(machine, stages, curves)


def machine_figures(curves: Mapping[str, Columns]) -> figures.Figures:
    """Draws memory, GPU utilization and GPU power over the seconds of each stage."""
    drawings: figures.Figures = {}
    for stage, columns in curves.items():
        if len(columns.get("seconds", ())) < MIN_SAMPLES:
            continue
        for name, (title, unit, labels) in CURVES.items():
            seconds = columns["seconds"]
            lines = {label: (seconds, columns[column]) for column, label in labels.items() if column in columns}
            if lines:
                drawings[f"{stage}_{name}"] = figures.over_time(f"{title}, {stage}", unit, lines)
    return drawings


def render_machine(measurements: Measurements, params: Params) -> str:
    """The content of reports/machine.html."""
    stages = measurements.stages
    return get_template("machine.html.jinja").render(
        params=params,
        palette=style.palette(),
        machine=measurements.machine,
        stages=stages,
        rows=[row for row in ROWS if any(entry.get(row[0]) is not None for entry in stages.values())],
        figures={name: Markup(style.svg(figure)) for name, figure in machine_figures(measurements.curves).items()},
    )
