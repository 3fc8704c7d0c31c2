"""The figures of the report."""

import re

import pytest
from matplotlib.text import Text

from pdf2lora.report import figures, style


def memory_figure(budget_gib):
    """The memory figure of a batch search on a GPU; the last probe is out of memory."""
    models = {"none": (2.0, 0.9, 64), "mlp": (2.0, 0.45, 42), "full": (2.0, 0.06, 64), "offload": (2.0, 0.05, 64)}
    probes = [
        {"gradient_checkpointing": name, "batch": batch, "fits": fixed + slope * batch < budget_gib, "peak_gib": peak}
        for name, (fixed, slope, largest) in models.items()
        for batch in (1, 20, largest)
        for peak in [fixed + slope * batch if fixed + slope * batch < 1.1 * budget_gib else None]
    ]
    lines = {name: {"fixed_gib": fixed, "gib_per_sequence": slope} for name, (fixed, slope, _) in models.items()}
    return figures.batch_memory(probes, lines, budget_gib)


def documents_figure():
    return figures.documents(
        [
            {"id": f"folder/{n}-{'long-' * 9}.pdf", "base_perplexity": 9.0 + n, "adapted_perplexity": 8.0}
            for n in range(40)
        ]
    )


def perplexities_figure():
    large = {"perplexity": 234_945.0, "low_95": 233_760.0, "high_95": 236_137.0}
    return figures.perplexities("Test documents", {"base": large, "base_unquantized": large, "adapted": large})


def inside(box, frame):
    return box.x0 >= frame.x0 and box.y0 >= frame.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1


@pytest.mark.parametrize("draw", [lambda: memory_figure(23.0), documents_figure, perplexities_figure])
def test_text_is_inside_the_figure(draw):
    figure = draw()
    figure.draw_without_rendering()

    words = [text for text in figure.findobj(Text) if re.search("[a-z]|^234,945", text.get_text())]  # no ticks
    cut = [text.get_text() for text in words if not inside(text.get_window_extent(), figure.bbox)]
    assert len(words) >= 5
    assert not cut


def test_memory_models_end_near_the_budget():
    """A line up to three budgets would leave little height for the points."""
    assert memory_figure(23.0).axes[0].get_ylim()[1] < 1.3 * 23.0


def test_bounds_are_of_one_value_of_gradient_checkpointing():
    probes = [
        {"gradient_checkpointing": "none", "batch": 30, "fits": True, "peak_gib": 1.0},
        {"gradient_checkpointing": "full", "batch": 2, "fits": True, "peak_gib": 1.0},
        {"gradient_checkpointing": "full", "batch": 4, "fits": False, "peak_gib": None},
    ]

    figure = figures.batch_bounds(probes, "full")

    assert figure.axes[0].get_ylim()[1] < 10
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"possible", "fits", "does not fit"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.pdf", "a/b"),
        ("folder/sub/end.pdf", "sub/end"),
        ("folder/0123456789.pdf", "0123456789"),
        ("folder/01234567890.pdf", "0123…67890"),
    ],
)
def test_a_long_name_loses_its_folders_and_then_its_middle(name, expected):
    assert figures.shortened(name, length=10) == expected


@pytest.mark.parametrize("name", ["cost_$5_and_$10", "100$ bill", r"x_$\frac$ y"])
def test_a_dollar_sign_starts_no_formula(name):
    figure = figures.documents([{"id": f"{name}.pdf", "base_perplexity": 9.0, "adapted_perplexity": 8.0}])

    assert name in style.svg(figure)
