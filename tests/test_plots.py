"""DVC's plots: the page without internet, the templates in .dvc/plots."""

import re
import subprocess

import pytest
import vl_convert
from dvc_render import VegaRenderer
from helpers import REPOSITORY

from commands import plots

WIDTH = 300  # of a plot, in DVC


def drawn(template, x, y, rows):
    """The plot as SVG, its marks labelled by what they stand for."""
    rows = [{"rev": "workspace", **row} for row in rows]
    folder = str(REPOSITORY / ".dvc/plots")
    plot = VegaRenderer(rows, "plot", template=template, template_dir=folder, x=x, y=y, x_label="x", y_label="GiB")
    return vl_convert.vegalite_to_svg(plot.get_filled_template())


def test_batch_search_shows_every_probe_whole_and_whether_it_fits():
    probes = [(1, 0.034, True), (2, 0.061, True), (9, 0.253, False), (8, 0.226, True)]

    svg = drawn("batch_search", "batch", "peak_gib", [{"batch": b, "peak_gib": g, "fits": f} for b, g, f in probes])

    points = re.findall(r'aria-label="x: (\d); GiB: ([\d.]+); .*?fits: (\w+)".*?translate\(([\d.]+),([\d.]+)\)', svg)
    assert [(int(batch), float(gib), fits == "true") for batch, gib, fits, _, _ in points] == probes
    for *_, across, down in points:
        assert 4 < float(across) < WIDTH - 4
        assert 4 < float(down) < WIDTH - 4


@pytest.mark.parametrize(
    ("gpu", "lines"),
    [([], ["process"]), (["", "9.5", "10.25", "9.5"], ["process", "GPU"])],
)
def test_memory_has_a_line_for_the_gpu_where_there_is_one(gpu, lines):
    rows = [{"seconds": str(second), "process_memory_gib": "0.57"} for second in range(4)]
    for row, gib in zip(rows, gpu, strict=False):
        row["gpu_memory_gib"] = gib

    svg = drawn("memory", "seconds", "process_memory_gib", rows)

    assert re.findall(r'aria-label="x: \d; GiB: [\d.]+; .*?of: (\w+)"', svg) == lines
    axis = re.search(r"'GiB' for a linear scale with values from ([\d.]+) to ([\d.]+)", svg)
    assert float(axis[2]) > max(float(gib) for gib in [*gpu, "0.57"] if gib)


def test_plots_page_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(command, **settings):
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(plots.subprocess, "run", run)

    with pytest.raises(SystemExit) as stopped:
        plots.main()

    page = (tmp_path / ".dvc/tmp/plots.html").read_text(encoding="utf-8")
    assert stopped.value.code == 0
    assert asked == [["config", "--local", "plots.html_template", "tmp/plots.html"], ["plots", "show"]]
    assert page.count("{plot_divs}") == 1
    assert "window.vegaEmbed" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert len(page) > 5e5
