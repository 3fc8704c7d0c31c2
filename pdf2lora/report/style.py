"""The style of the report's figures: one palette for light and dark mode. The same numbers give the same bytes.

matplotlib draws with the light colours. `svg` replaces each colour by a CSS variable. The page sets these variables for
light and dark mode; an SVG file outside the page sets them itself.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# role -> colour on white, colour on black; colour-blind readers can distinguish base and adapted (Okabe and Ito 2008)
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
    "svg.hashsalt": "pdf2lora",  # without it the ids of the SVG are random
    "svg.fonttype": "none",  # text is stored as text, not as outlines: small, searchable, in the page's font
    "text.parse_math": False,  # a $ in the name of a PDF starts no formula
    "font.family": "DejaVu Sans",  # comes with matplotlib, so text has the same width on every machine
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
    """Yields an empty figure, 4.8 inches wide and `height` inches high. Draw inside the block."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.8, height))
        area = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
        yield figure, area


def svg(figure: Figure) -> str:
    """The figure as an SVG element without background, with the colours var(--figure-<role>)."""
    output = BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(output, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = output.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Removes the ids of groups: they are numbers, which would repeat in the next figure of the page.
    text = re.sub(r'(<g|<svg\b[^>]*?) id="[\w.]+"', r"\1", text).replace("*{stroke", "svg *{stroke")
    text = text.replace("'DejaVu Sans'", "inherit").replace("font: 9px inherit", "font-size: 9px")
    for role, light in LIGHT.items():
        text = text.replace(light, f"var(--figure-{role})")
    return text


def palette() -> dict[str, Markup]:
    """ "light" and "dark" -> CSS declarations of the variables."""
    return {
        theme: Markup(" ".join(f"--figure-{role}: {colours[number]};" for role, colours in PALETTE.items()))
        for number, theme in enumerate(("light", "dark"))
    }


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes <name>.svg for light and dark mode and <name>.png on white. Returns svg(figure)."""
    inline = svg(figure)
    colours = palette()
    themes = (
        f"<style>:root {{ {colours['light']} font-family: sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {colours['dark']} }} }}</style>"
    )
    end_of_tag = inline.index(">") + 1
    (folder / f"{name}.svg").write_text(inline[:end_of_tag] + themes + inline[end_of_tag:], encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return inline
