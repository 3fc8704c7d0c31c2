"""reports/index.html."""

import re
from html.parser import HTMLParser

import pytest
from example_run import write_run
from helpers import REPOSITORY

from pdf2lora.params import read_params
from pdf2lora.paths import BASE
from pdf2lora.report import style
from pdf2lora.report.page import render_page, result_figures
from pdf2lora.report.results import read_results
from pdf2lora.report.templates import number

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """The page of a run without figures, because they take the most time: page_of(improvement=0.1)."""
    monkeypatch.chdir(tmp_path)

    def make(changes: dict | None = None, extract: dict | None = None, **details: object) -> str:
        results = read_results(write_run(tmp_path, **details) / "models/source/demo", [BASE])
        results.evaluation.update(changes or {})
        results.extract.update(extract or {})
        return render_page(results, read_params(REPOSITORY / "params.yaml"), {})

    return make


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The page of a run with its figures."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = read_results(folder / "models/source/demo", [BASE])
        svgs = {name: style.svg(figure) for name, figure in result_figures(results).items()}
    return render_page(results, read_params(REPOSITORY / "params.yaml"), svgs)


class Outline(HTMLParser):
    """Unclosed tags, ids, text and links of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        names = dict(attrs)
        self.ids += [names["id"]] if "id" in names else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def test_is_well_formed_and_loads_no_other_file(html):
    outline = Outline(html)

    assert outline.open == []
    assert outline.wrong == []
    assert {link for link in outline.links if not link.startswith("#")} == {"machine.html"}
    anchors = {link[1:] for link in outline.links if link.startswith("#")}
    assert anchors <= set(outline.ids)


def test_css_and_svg_load_no_other_file(html):
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html


def test_ids_are_unique(html):
    ids = [name for name in Outline(html).ids if not re.fullmatch(r"[mpC]\w*[0-9a-f]{8,}\w*", name)]

    assert len(ids) == len(set(ids))


def test_has_the_results_of_the_stages(html):
    text = Outline(html).text

    assert "test perplexity, 4-bit base20.0019.90 to 20.10" in text
    assert "8 sequences of 512 tokens fit in 11.50 GiB (NVIDIA T4)" in text
    assert "The per-device batch is 4, accumulated 2 times: 8 sequences per optimizer step" in text
    assert "gradient checkpointing: full, kernels: fused" in text
    assert "out of memory" in text
    assert "over the budget" in text
    assert "no text layer" in text
    assert "Languages: de 2, en 5." in text
    assert "test-3.pdf" in text


def test_text_of_documents_and_models_is_escaped(html):
    assert "<b>scan</b>" not in html
    assert "&lt;b&gt;scan&lt;/b&gt;.pdf" in html
    assert "is &lt;script&gt;" in html


@pytest.mark.parametrize(("improvement", "words"), [(0.05, "contains zero"), (-0.3, "makes the model worse")])
def test_warns_where_the_adapter_does_not_help(page_of, improvement, words):
    assert words in page_of(improvement=improvement)


def test_tokens_are_coloured_by_the_change_of_their_nats(html):
    assert re.search(r'token less" style="--strength: 50%"[^>]*>Sea<', html)
    assert re.search(r'token more" style="--strength: 25%"[^>]*> &lt;i&gt;<', html)


def test_has_the_palette_of_both_modes(html):
    assert "prefers-color-scheme: dark" in html
    for role, (light, dark) in style.PALETTE.items():
        assert f"--figure-{role}: {light};" in html
        assert f"--figure-{role}: {dark};" in html


@pytest.mark.parametrize(("num_test", "has_histogram"), [(4, False), (30, True)])
def test_many_documents_get_a_histogram(tmp_path, monkeypatch, num_test, has_histogram):
    monkeypatch.chdir(tmp_path)
    results = read_results(write_run(tmp_path, num_test=num_test) / "models/source/demo", [])

    assert ("improvement" in result_figures(results)) == has_histogram


def test_colours_of_figures_are_variables(html):
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)

    assert len(svgs) == 9
    assert not [colour for svg in svgs for colour in re.findall(r"#[0-9a-f]{6}\b", svg)]


def test_tables_of_many_documents_have_the_best_and_the_worst(page_of):
    tables = page_of(num_test=30).split("Lowest adapted perplexity")[1].split('<section id="text">')[0]

    shown = re.findall(r"test-(\d+)\.pdf", tables)
    assert shown == ["0", "1", "2", "3", "4", "29", "28", "27", "26", "25"]


def test_the_page_of_a_large_corpus_lists_a_part_of_it(page_of, html):
    large = page_of(extract={"documents": 20_000, "left_out": {"no_text_layer": 1_000}})

    assert "The first 8 of 20,000 PDFs" in large
    assert "&lt;b&gt;scan&lt;/b&gt;.pdf and 999 more" in large
    assert "All 8 PDFs" in html


def test_a_table_of_few_documents_has_all(page_of):
    html = page_of(num_test=4)

    assert "By adapted perplexity" in html
    assert "Lowest adapted perplexity" not in html


def test_settings_are_written_as_in_params_yaml(page_of):
    html = page_of()

    assert "<dt>use_dora</dt><dd>false</dd>" in html
    assert "<dt>timeout_s</dt><dd>30</dd>" in html
    assert "<dt>target_modules</dt><dd>q_proj, k_proj, v_proj, o_proj</dd>" in html


def test_a_run_without_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = read_results(write_run(tmp_path, num_validation=0) / "models/source/demo", [])

    assert ">validation</text>" not in style.svg(result_figures(results)["loss"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.176, "8.18"), (9_999.5, "9,999.50"), (232_016.0, "232,016"), (1_234_567, "1,234,567"), (None, "–")],
)
def test_large_numbers_have_no_decimals(value, text):
    assert number(value) == text


def test_shows_the_three_models_side_by_side(html):
    text = Outline(html).text

    assert "test perplexity, unquantized base19.61" in text
    assert "test, adapted15.00" in text
    assert "general text, adapted30.60" in text
    assert "improvement over the unquantized base23.5%" in text


def test_shows_the_comparison_with_the_baseline(page_of, tmp_path):
    improvement = {"share": 0.1, "low_95": None, "high_95": None}
    comparison = {"baseline": "main", "commit": "0123456789", "documents": 2, "baseline_perplexity": 10.0}
    comparison |= {"current_perplexity": 9.0, "improvement": improvement, "significant": None}

    html = page_of(changes={"comparison": comparison})

    assert "Comparison with main (0123456)" in html
    assert "no verdict: too few documents" in html


def test_shows_the_kept_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    (tmp_path / "metrics/train/metrics.json").write_text('{"step": 3, "kept_step": 2}')
    results = read_results(tmp_path / "models/source/demo", [])

    assert "the adapter of step 2" in render_page(results, read_params(REPOSITORY / "params.yaml"), {})
    assert ">kept</text>" in style.svg(result_figures(results)["loss"])


def test_shows_the_share_of_replay_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    params = read_params(REPOSITORY / "params.yaml")
    without = render_page(read_results(tmp_path / "models/source/demo", []), params, {})
    (tmp_path / "metrics/train/metrics.json").write_text('{"step": 3, "replay_share": 0.0987}')

    html = render_page(read_results(tmp_path / "models/source/demo", []), params, {})

    assert "9.9% of the training tokens are replay text" in html
    assert "replay text" not in without.replace("Replay text (train.replay)", "")
