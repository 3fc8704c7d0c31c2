"""reports/: one page from the results of a run, the same bytes each time, with nothing of the machine in it."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import REPOSITORY
from matplotlib.text import Text
from ruamel.yaml import YAML
from tiny_llama import make_document

from pdf2lora.documents.records import write_documents
from pdf2lora.params import read_params
from pdf2lora.report import figures, page, style
from pdf2lora.report.card import render_card
from pdf2lora.report.results import read_artifacts, read_columns, read_results
from pdf2lora.weights.licences import find_licences
from stages import report

VOID = {"meta", "br", "img", "link", "input", "hr"}


def write_run(folder: Path, *, num_test: int = 4, num_validation: int = 1, improvement: float = 0.25) -> Path:
    """What the stages before report write, of a run on a GPU, with made-up numbers."""
    names = [f"test-{n}.pdf" for n in range(num_test)]
    sides = {"train": ["a.pdf", "b.pdf"], "validation": ["v.pdf"][:num_validation], "test": names}
    documents = {name: make_document(name, f"text of {name} ") for side in sides.values() for name in side}
    bad = make_document("<b>scan</b>.pdf", "")
    left_out = type(bad)(**{**vars(bad), "reason": "no_text_layer", "engine": None})
    (folder / "data/split").mkdir(parents=True)
    write_documents(folder / "data/documents.jsonl", [*documents.values(), left_out])
    for side, ids in sides.items():
        write_documents(folder / f"data/split/{side}.jsonl", [documents[name] for name in ids])
    checkpoint = folder / "models/source/demo"
    checkpoint.mkdir(parents=True)
    (checkpoint / "LICENSE.txt").write_text("terms")

    def interval(value: float) -> dict[str, float]:
        return {"low_95": value - 0.1, "high_95": value + 0.1}

    rows = [[name, 100, 400, 80, 20.0 + n, (20.0 + n) * (1 - improvement), improvement] for n, name in enumerate(names)]
    probes = [
        {"gradient_checkpointing": "none", "batch": 1, "fits": True, "peak_gib": 6.0},
        {"gradient_checkpointing": "none", "batch": 8, "fits": False, "peak_gib": None},
        {"gradient_checkpointing": "full", "batch": 1, "fits": True, "peak_gib": 4.0},
        {"gradient_checkpointing": "full", "batch": 2, "fits": True, "peak_gib": 5.0},
        {"gradient_checkpointing": "full", "batch": 9, "fits": False, "peak_gib": 12.0},
        {"gradient_checkpointing": "full", "batch": 8, "fits": True, "peak_gib": 11.0},
    ]
    scores = {"bits_per_byte": 1.0, "word_perplexity": 100.0}
    metrics = {
        "extract": {"documents": 8, "kept": 7, "left_out": {"no_text_layer": 1}, "engine": {"pdfium": 7}, "partial": 0,
                    "pages_read": 7, "characters_raw": 1100, "characters": 1000},
        "split": {side: {"documents": len(ids), "characters": 100, "words": 20} for side, ids in sides.items()}
        | {"test_13grams_in_train": 0.02},
        "convert": {"layout": "meta", "num_parameters": 4983552, "hidden_size": 256, "num_layers": 5,
                    "vocab_size": 4096, "context_length": 131072},
        "batch": {"device": "NVIDIA T4", "budget_gib": 11.5, "kernels": "fused", "gradient_checkpointing": "full",
                  "largest_batch": 8, "per_device_batch": 4, "gradient_accumulation_steps": 2, "effective_batch": 8,
                  "modes": {"none": {"largest_batch": 1},
                            "full": {"largest_batch": 8, "fixed_gib": 3.0, "gib_per_sequence": 1.0}},
                  "probes": probes},
        "eval": {"base": {"perplexity": 20.0, **scores, **interval(20.0)},
                 "adapted": {"perplexity": 20 * (1 - improvement), **scores, **interval(20 * (1 - improvement))},
                 "improvement": {"share": improvement, **interval(improvement)},
                 "documents": num_test, "tokens": 100 * num_test},
    }  # fmt: skip
    curves = {"train/loss": 3.0, "train/perplexity": 20.0, "learning_rate": 1e-4, "gradient_norm": 0.5}
    if num_validation:
        curves |= {"validation/loss": 3.1, "validation/perplexity": 22.0}
    for name, value in curves.items():
        file = folder / f"metrics/train/plots/metrics/{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"step\t{file.stem}\n" + "".join(f"{step}\t{value / step}\n" for step in (1, 2, 3)))
    for name, value in metrics.items():
        (folder / f"metrics/{name}.json").write_text(json.dumps(value))
    header = "id,tokens,bytes,words,base_perplexity,adapted_perplexity,improvement"
    (folder / "metrics/eval_documents.csv").write_text(
        "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
    )
    tokens = [
        {"text": "Sea", "base_nats": 3.0, "adapted_nats": 1.0},
        {"text": " <i>", "base_nats": 1, "adapted_nats": 2},
    ]
    sample = {"document": names[0], "prompt": "Sea", "truth": " <i>", "base": " is <script>", "adapted": " rises"}
    (folder / "data/samples.json").write_text(json.dumps([sample | {"tokens": tokens}]))
    shutil.copy(REPOSITORY / "dvc.lock", folder / "dvc.lock")
    return folder


def write_machine(folder: Path, watts: float = 300.0) -> None:
    """machine.json and a curve of 20 seconds."""
    stages = {
        "train": {"seconds": 20.0, "tokens_per_s": 34567, "joules_per_million_tokens": 15043},
        "sample": {"seconds": 1.0},
    }
    (folder / "metrics/machine").mkdir()
    (folder / "metrics/machine.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA T4"}} | stages))
    rows = [f"{second}\t2.0\t11.0\t{90 + second % 2}\t{watts}" for second in range(21)]
    header = "seconds\tprocess_memory_gib\tgpu_memory_gib\tgpu_utilization_percent\tgpu_power_w"
    (folder / "metrics/machine/train.tsv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def run(tmp_path, monkeypatch, write_params):
    """Makes a run in tmp_path and reports it: run(num_test=30)."""
    write_params()
    monkeypatch.chdir(tmp_path)

    def make(**details: object) -> str:
        write_run(tmp_path, **details)
        report.main()
        return Path("reports/index.html").read_text(encoding="utf-8")

    return make


@pytest.fixture
def words_of(tmp_path, monkeypatch):
    """The page of a run without its figures, which take the most time: words_of(improvement=0.1)."""
    monkeypatch.chdir(tmp_path)

    def make(**details: object) -> str:
        results = read_results(write_run(tmp_path, **details) / "models/source/demo", ["models/base"])
        return page.render_page(results, read_params(REPOSITORY / "params.yaml"), {}, "0")

    return make


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """index.html of a run, made once."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    shutil.copy(REPOSITORY / "params.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report.main()
    return (folder / "reports/index.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags that are left open, ids, text, and what the page would load."""

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


class TestPage:
    def test_is_well_formed_and_loads_nothing_but_the_machine_file(self, html):
        outline = Outline(html)

        assert outline.open == []
        assert outline.wrong == []
        assert {link for link in outline.links if not link.startswith("#")} == {"machine.js"}
        anchors = {link[1:] for link in outline.links if link.startswith("#")}
        assert anchors <= set(outline.ids)

    def test_css_and_svg_name_no_other_file(self, html):
        assert set(re.findall(r"url\((.)", html)) <= {"#"}
        assert "@import" not in html

    def test_ids_differ_except_those_of_equal_shapes(self, html):
        ids = [name for name in Outline(html).ids if not re.fullmatch(r"[mpC]\w*[0-9a-f]{8,}\w*", name)]

        assert len(ids) == len(set(ids))

    def test_tells_what_happened(self, html):
        text = Outline(html).text

        assert "test perplexity, base20.00[19.90, 20.10]" in text
        assert "8 sequences of 512 tokens fit in 11.50 GiB (NVIDIA T4)" in text
        assert "Training takes 4 at a time and accumulates 2 times: 8 sequences" in text
        assert "gradient checkpointing: full, kernels: fused" in text
        assert "out of memory" in text
        assert "over the budget" in text
        assert "no text layer" in text
        assert "test-3.pdf" in text

    def test_documents_and_models_cannot_write_html(self, html):
        assert "<b>scan</b>" not in html
        assert "&lt;b&gt;scan&lt;/b&gt;.pdf" in html
        assert "is &lt;script&gt;" in html

    @pytest.mark.parametrize(
        ("improvement", "words"), [(0.25, "lies above zero"), (0.05, "includes zero"), (-0.3, "made the model worse")]
    )
    def test_says_whether_the_adapter_helps(self, words_of, improvement, words):
        assert words in words_of(improvement=improvement)

    def test_colours_tokens_by_what_changed(self, html):
        assert re.search(r'token less" style="--strength: 50%"[^>]*>Sea<', html)
        assert re.search(r'token more" style="--strength: 25%"[^>]*> &lt;i&gt;<', html)

    def test_has_every_figure_and_both_themes(self, run):
        html = run(num_test=30)

        assert html.count("<figure>") == 9
        assert "prefers-color-scheme: dark" in html
        for role, (light, dark) in style.PALETTE.items():
            assert f"--figure-{role}: {light};" in html
            assert f"--figure-{role}: {dark};" in html

    def test_colours_of_figures_are_variables(self, html):
        svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)

        assert len(svgs) == 8
        assert not [colour for svg in svgs for colour in re.findall(r"#[0-9a-f]{6}\b", svg)]

    def test_of_many_documents_the_tables_hold_both_ends(self, words_of):
        tables = words_of(num_test=30).split("Lowest perplexity, adapted")[1].split('<section id="text">')[0]

        shown = re.findall(r"test-(\d+)\.pdf", tables)
        assert shown == ["0", "1", "2", "3", "4", "29", "28", "27", "26", "25"]

    def test_of_few_documents_one_table_holds_all(self, words_of):
        html = words_of(num_test=4)

        assert "By perplexity, adapted" in html
        assert "Lowest perplexity, adapted" not in html

    def test_settings_stand_as_in_params(self, words_of):
        html = words_of()

        assert "<dt>use_dora</dt><dd>false</dd>" in html
        assert "<dt>timeout_s</dt><dd>30</dd>" in html
        assert "<dt>target_modules</dt><dd>q_proj, k_proj, v_proj, o_proj</dd>" in html

    def test_says_what_differs_on_another_machine(self, words_of):
        assert "on another one the adapter, losses and perplexities differ in their last digits" in words_of()

    def test_needs_no_validation(self, run):
        html = run(num_validation=0)

        assert "Perplexity" in html
        assert ">validation</text>" not in html


class TestOutputs:
    def test_are_the_same_bytes_whatever_the_machine_measured(self, run, tmp_path):
        outputs = [
            "index.html",
            "model_card.md",
            *(f"figures/{n}.{e}" for n in ("loss", "documents") for e in ("svg", "png")),
        ]
        run()
        before = {name: Path("reports", name).read_bytes() for name in outputs}
        write_machine(tmp_path)

        report.main()

        assert {name: Path("reports", name).read_bytes() for name in outputs} == before

    def test_figures_are_files_too(self, run):
        run()

        for file in Path("reports/figures").glob("*.svg"):
            assert ET.parse(file).getroot().tag.endswith("svg")
            assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
            assert "prefers-color-scheme: dark" in file.read_text(encoding="utf-8")
        assert {file.stem for file in Path("reports/figures").glob("*.png")} >= {"loss", "batch_bounds", "documents"}

    def test_dvc_yaml_lists_the_templates_and_no_machine_file(self):
        pipeline = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))
        stage = pipeline["stages"]["report"]
        templates = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "pdf2lora/report").glob("*.jinja")}

        assert {dep for dep in stage["deps"] if dep.endswith(".jinja")} == templates
        assert stage["outs"] == ["reports/figures", "reports/index.html", "reports/model_card.md"]


class TestMachine:
    def test_carries_the_key_of_the_page(self, run, tmp_path):
        write_run(tmp_path)
        write_machine(tmp_path)
        report.main()
        html, script = (Path("reports", name).read_text(encoding="utf-8") for name in ("index.html", "machine.js"))

        key = re.search(r'<body data-run="([0-9a-f]{16})">', html).group(1)
        assert script.startswith(f'showMachine("{key}", ')
        _, part = json.loads("[" + script.removeprefix("showMachine(").removesuffix(");\n") + "]")
        assert "34,567" in part
        assert "<tr><td>joules a million tokens</td><td>15,043</td><td>–</td></tr>" in part
        assert "There was no GPU" not in part
        assert part.count("<svg") == 3

    def test_another_run_has_another_key(self, run, html):
        keys = [re.search(r'data-run="(\w+)"', page).group(1) for page in (html, run(improvement=0.3))]

        assert keys[0] != keys[1]

    def test_says_that_there_was_no_gpu_and_that_nothing_was_measured(self):
        without_gpu = page.render_machine({"machine": {"gpu": None}, "train": {"seconds": 1.0}}, {}, "0")

        assert "There was no GPU" in without_gpu
        assert "utilization, %" not in without_gpu
        assert "Nothing was measured here" in page.render_machine({}, {}, "0")

    def test_energy_is_what_the_gpu_counted_else_power_over_time(self):
        curves = {"train": {"seconds": [0.0, 10.0, 30.0], "gpu_power_w": [100.0, 300.0, 300.0]}}

        entry = page.with_energy({"train": {"seconds": 30.0}}, curves)["train"]

        assert entry["energy_wh"] == pytest.approx((200 * 10 + 300 * 20) / 3600)
        assert page.with_energy({"train": {"joules": 7200}}, curves)["train"]["energy_wh"] == 2

    def test_a_stage_of_a_few_seconds_has_no_curve(self):
        seconds = {"seconds": [0.0, 1.0], "process_memory_gib": [1.0, 1.0]}

        assert page.machine_figures({"sample": seconds}) == {}

    def test_a_gap_in_a_curve_is_no_number(self, tmp_path):
        (tmp_path / "train.tsv").write_text("seconds\tgpu_power_w\n0.0\t\n1.0\t200\n")

        columns = read_columns(tmp_path / "train.tsv")

        assert math.isnan(columns["gpu_power_w"][0])
        assert columns["gpu_power_w"][1] == 200


class TestCard:
    def test_says_what_one_must_know(self, run):
        run()
        card = Path("reports/model_card.md").read_text(encoding="utf-8")
        front = YAML(typ="safe").load(card.split("---\n")[1])

        assert front["library_name"] == "peft"
        assert "| base in 4 bits with the adapter | 15.00 | 14.90 to 15.10 |" in card
        assert "lowers it by 25.0%" in card
        assert "| lora.target_modules | q_proj, k_proj, v_proj, o_proj |" in card
        assert "LICENSE.txt in `models/source/demo`" in card
        assert "More Information Needed" not in card

    def test_says_that_there_is_no_licence_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (write_run(tmp_path) / "models/source/demo/LICENSE.txt").unlink()
        results = read_results(Path("models/source/demo"), [])

        card = render_card(results, read_params(REPOSITORY / "params.yaml"))

        assert "No licence file lies in `models/source/demo`" in card

    @pytest.mark.parametrize("name", ["LICENSE", "Licence.txt", "USE_POLICY.md", "NOTICE"])
    def test_licences_are_known_by_name(self, tmp_path, name):
        (tmp_path / name).touch()
        (tmp_path / "params.json").touch()

        assert find_licences(tmp_path) == [name]


def of_four_modes(budget_gib):
    """The memory figure of a search on a GPU; the last probe ran out of memory."""
    modes = {"none": (2.0, 0.9, 64), "mlp": (2.0, 0.45, 42), "full": (2.0, 0.06, 64), "offload": (2.0, 0.05, 64)}
    probes = [
        {"gradient_checkpointing": mode, "batch": batch, "fits": fixed + slope * batch < budget_gib, "peak_gib": peak}
        for mode, (fixed, slope, largest) in modes.items()
        for batch in (1, 20, largest)
        for peak in [fixed + slope * batch if fixed + slope * batch < 1.1 * budget_gib else None]
    ]
    lines = {mode: {"fixed_gib": fixed, "gib_per_sequence": slope} for mode, (fixed, slope, _) in modes.items()}
    return figures.batch_memory(probes, lines, budget_gib)


def of_many_documents():
    return figures.documents(
        [
            {"id": f"folder/{n}-{'long-' * 9}.pdf", "base_perplexity": 9.0 + n, "adapted_perplexity": 8.0}
            for n in range(40)
        ]
    )


class TestFigures:
    @pytest.mark.parametrize("draw", [lambda: of_four_modes(23.0), of_many_documents])
    def test_no_word_is_cut(self, draw):
        figure = draw()
        figure.draw_without_rendering()

        words = [text for text in figure.findobj(Text) if re.search("[a-z]", text.get_text())]  # no ticks out of sight
        cut = [text.get_text() for text in words if not inside(text.get_window_extent(), figure.bbox)]
        assert len(words) >= 8
        assert not cut

    def test_memory_is_drawn_as_far_as_the_budget(self):
        """Where a line would lead to three times as much, the points would be squeezed at the bottom."""
        assert of_four_modes(23.0).axes[0].get_ylim()[1] < 1.3 * 23.0

    def test_bounds_keep_to_one_way_of_checkpointing(self):
        probes = [
            {"gradient_checkpointing": "none", "batch": 30, "fits": True, "peak_gib": 1.0},
            {"gradient_checkpointing": "full", "batch": 2, "fits": True, "peak_gib": 1.0},
            {"gradient_checkpointing": "full", "batch": 4, "fits": False, "peak_gib": None},
        ]

        figure = figures.batch_bounds(probes, "full")

        assert figure.axes[0].get_ylim()[1] < 10
        assert {text.get_text() for text in figure.legends[0].get_texts()} == {"still open", "fits", "does not fit"}

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("a/b.pdf", "a/b"),
            ("folder/sub/end.pdf", "sub/end"),
            ("folder/0123456789.pdf", "0123456789"),
            ("folder/01234567890.pdf", "0123…67890"),
        ],
    )
    def test_a_document_s_name_loses_folders_then_its_middle(self, name, shown):
        assert figures.shortened(name, length=10) == shown


def inside(box, frame):
    return box.x0 >= frame.x0 and box.y0 >= frame.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1


class TestArtifacts:
    def test_come_from_dvc_lock_in_the_order_asked_for(self):
        found = read_artifacts(REPOSITORY / "dvc.lock", ["models/base", "no/such", "data/pdfs/demo"])

        assert [artifact.path for artifact in found] == ["models/base", "data/pdfs/demo"]
        assert found[1].md5.endswith(".dir")
        assert found[1].num_files == 43

    def test_are_not_those_of_the_run_before(self, tmp_path):
        """While report runs, its own part of the lock is still the last run's."""
        before = {"path": "models/adapter", "md5": "before.dir", "size": 1, "nfiles": 3}
        stages = {
            "train": {"outs": [before | {"md5": "now.dir", "nfiles": 2}]},
            "evaluate": {"deps": [before | {"md5": "now.dir", "nfiles": 2}]},
            "report": {"deps": [before], "outs": []},
        }
        YAML(typ="safe").dump({"stages": stages}, tmp_path / "dvc.lock")

        (found,) = read_artifacts(tmp_path / "dvc.lock", ["models/adapter"])

        assert (found.md5, found.num_files) == ("now.dir", 2)

    def test_without_a_lock_there_are_none(self, tmp_path):
        assert read_artifacts(tmp_path / "dvc.lock", ["models/base"]) == []


def test_a_run_without_params_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit) as stopped:
        report.main()

    assert "error: params.yaml: there is no such file" in str(stopped.value)
