"""How the report's figures look: one palette for light and dark, the same bytes each time.

matplotlib draws with the light colours. In the SVG each of them then becomes a variable that the page, or the file
itself where it stands alone, sets for light and for dark.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# role -> its colour on white, its colour on black; base and adapted are told apart by every kind of eye (Okabe, Ito)
PALETTE = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "grid": ("#d1d9e0", "#3d444d"),
    "base": ("#b35900", "#f0a35e"),
    "adapted": ("#0b62c4", "#6cb0ff"),
    "train": ("#1b7c83", "#4fc3cb"),
    "validation": ("#8250df", "#bc9bff"),
    "bad": ("#cf222e", "#ff7b72"),
    "good": ("#1a7f37", "#4cc261"),
}
LIGHT = {role: light for role, (light, _) in PALETTE.items()}
PNG_DPI = 160

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "pdf2lora",  # ids of the SVG would be random
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that it measures the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@contextmanager
def axes(title: str, x_label: str, y_label: str, *, height: float = 3.0) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of the report, 4.8 inches wide; it is drawn on and saved inside the block."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.8, height))
        area = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
        yield figure, area


def svg(figure: Figure) -> str:
    """The figure as an SVG element without a background, its colours var(--figure-<role>)."""
    drawn = BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers every part, and the same numbers would come again in the page's next figure
    text = re.sub(r'(<g|<svg\b[^>]*?) id="[\w.]+"', r"\1", text).replace("*{stroke", "svg *{stroke")
    text = text.replace("'DejaVu Sans'", "inherit").replace("font: 9px inherit", "font-size: 9px")
    for role, light in LIGHT.items():
        text = text.replace(light, f"var(--figure-{role})")
    return text


def variables(theme: int) -> str:
    """CSS declarations of the palette; theme: 0 light, 1 dark."""
    return " ".join(f"--figure-{role}: {colours[theme]};" for role, colours in PALETTE.items())


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes <name>.svg, which follows the reader's theme, and <name>.png, on white; returns svg(figure)."""
    inline = svg(figure)
    themes = (
        f"<style>:root {{ {variables(0)} font-family: sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(1)} }} }}</style>"
    )
    end_of_tag = inline.index(">") + 1
    (folder / f"{name}.svg").write_text(inline[:end_of_tag] + themes + inline[end_of_tag:], encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return inline
