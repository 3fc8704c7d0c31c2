"""dvc.yaml, params.yaml, the requirements and the README against the code that they speak of."""

import ast
import json
import re
import shutil
import subprocess
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML
from scmrepo.git import Git

from pdf2lora.documents.records import Reason, read_documents
from pdf2lora.params import Params, read_params
from stages import extract

ROOT = Path(__file__).parent.parent
PIPELINE: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]
PLOTS: dict[str, dict[str, Any]] = {name: plot for entry in PIPELINE["plots"] for name, plot in entry.items()}
DATA_STAGES = ("check", "extract", "split")


# Code that cannot change an output of a stage. A stage that imports it does not depend on it.
PLUMBING = {
    "pdf2lora/errors.py": "reports errors",
    "pdf2lora/params.py": "reads params.yaml: the values are params of the stage",
    "pdf2lora/runtime": "files, locks, processes, monitoring",
    "pdf2lora/training/throughput.py": "tokens/s of one machine",
    "pdf2lora/training/tracking.py": "log lines and curves of what the loop computes",
    "pdf2lora/training/probe_process.py": "starts the process that measures",
}


def imported_modules(file: Path) -> set[str]:
    """Files of this project that `file` imports, directly or through others, as paths from the root.

    Imports inside functions count, and so does the name of a module in a string.
    """
    found: set[str] = set()
    waiting = [file]
    while waiting:
        tree = ast.parse(waiting.pop().read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("pdf2lora", "stages"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and re.fullmatch(r"pdf2lora(\.\w+)+", str(node.value)):
                names = [node.value]
            else:
                continue
            for path in (ROOT / f"{name.replace('.', '/')}.py" for name in names):
                relative = str(path.relative_to(ROOT))
                if path.exists() and relative not in found and not is_plumbing(relative):
                    found.add(relative)
                    waiting.append(path)
    return found


def is_plumbing(path: str) -> bool:
    return any(path == entry or path.startswith(f"{entry}/") for entry in PLUMBING)


def code_of(dep: str) -> set[str]:
    """The modules of a dependency: one file, the files of a folder of pdf2lora, or none where it is data."""
    if dep.startswith("pdf2lora/") and (ROOT / dep).is_dir():
        return {str(file.relative_to(ROOT)) for file in (ROOT / dep).rglob("*.py") if file.name != "__init__.py"}
    return {dep} if dep.endswith(".py") else set()


@pytest.mark.parametrize("entry", PLUMBING)
def test_plumbing_exists(entry):
    assert (ROOT / entry).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_imports(stage):
    """All imported code is covered. A folder may cover more than is imported; a file may not."""
    deps = STAGES[stage]["deps"]
    imported = {f"stages/{stage}.py"} | imported_modules(ROOT / f"stages/{stage}.py")

    assert imported <= {file for dep in deps for file in code_of(dep)}
    assert {dep for dep in deps if dep.endswith(".py")} <= imported
    assert not [dep for dep in deps if (ROOT / dep).is_dir() and code_of(dep) and not code_of(dep) & imported]


LAYERS = (  # from low to high: a module imports its own layer and lower ones
    "errors",
    "runtime",
    "params",
    "tokens",
    "documents",
    "weights",
    "model",
    "evaluation",
    "training",
    "report",
    "preflight",
)


def test_imports_go_from_high_layers_to_low_ones():
    wrong = []
    for file in (ROOT / "pdf2lora").rglob("*.py"):
        if file.parent.name == "pdf2lora" and file.stem == "__init__":
            continue
        layer = file.relative_to(ROOT / "pdf2lora").parts[0].removesuffix(".py")
        for imported in direct_imports(file):
            other = imported.split(".")[1] if imported.count(".") else ""
            if imported.split(".")[0] != "pdf2lora" or LAYERS.index(other) > LAYERS.index(layer):
                wrong.append(f"{file.relative_to(ROOT)} imports {imported}")
    assert not wrong


def test_no_stage_is_imported_by_anything_else():
    importers = [
        str(file.relative_to(ROOT))
        for folder in ("pdf2lora", "stages", "commands", "benchmarks", "demo")
        for file in (ROOT / folder).rglob("*.py")
        if any(name.split(".")[0] == "stages" for name in direct_imports(file))
    ]
    assert not importers


def direct_imports(file: Path) -> list[str]:
    """Modules of this project that a file names in its import statements, those inside functions too."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.split(".")[0] in ("pdf2lora", "stages", "commands", "benchmarks", "demo")]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_everywhere(stage):
    docstring = ast.get_docstring(ast.parse((ROOT / f"stages/{stage}.py").read_text(encoding="utf-8"))) or ""

    assert re.match(rf"{stage}: .+ -> .+", docstring)
    assert STAGES[stage]["cmd"].endswith(f"-m stages.{stage}")
    assert STAGES[stage]["desc"]


def test_every_stage_file_is_a_stage():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} == set(STAGES)


def params_of(stage: str) -> list[str]:
    """The params of a stage; `params.yaml:` in dvc.yaml means all sections."""
    params = STAGES[stage].get("params", [])
    return list(Params.model_fields) if {"params.yaml": None} in params else params


@pytest.mark.parametrize("stage", STAGES)
def test_params_of_a_stage_exist_and_its_own_section_is_among_them(stage):
    params = read_params(ROOT / "params.yaml").model_dump()
    for key in params_of(stage):
        value: Any = params
        for part in key.replace("${model}", params["model"]).split("."):
            value = value[part]

    if stage in Params.model_fields:
        assert stage in params_of(stage)


def test_every_section_of_params_belongs_to_a_stage():
    used = {key.split(".")[0] for stage in STAGES for key in params_of(stage)}

    assert used == set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_small_results_are_in_git_and_not_in_the_cache(stage):
    for kind in ("metrics", "plots"):
        for entry in STAGES[stage].get(kind, []):
            assert entry[next(iter(entry))]["cache"] is False
    plain = [entry for entry in STAGES[stage].get("outs", []) if isinstance(entry, dict)]
    assert not [entry for entry in plain if "cache" in entry[next(iter(entry))]]  # or DVC would not find its runs again


def test_what_one_machine_measured_is_no_output_of_a_stage():
    assert not [stage for stage in STAGES.values() if "machine" in str(stage.get("metrics")) + str(stage.get("plots"))]


def test_dvc_draws_each_curve_once():
    """A file inside a plot of its stage would be drawn again, by itself."""
    drawn = [file for plot in PLOTS.values() for file in plot["y"]]
    by_stages = [path for stage in STAGES.values() for plot in stage.get("plots", []) for path in plot]

    assert len(drawn) == len(set(drawn))
    assert not [file for file in drawn if any(Path(file).is_relative_to(path) for path in by_stages)]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_has_a_title_and_axes(name):
    assert {"title", "x", "x_label", "y_label"} <= PLOTS[name].keys()


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("data/pdfs/mine/paper.pdf", True),
        ("data/pdfs/mine/sub/paper.pdf", True),
        ("models/source/llama_3b/model.safetensors", True),
        ("models/source/llama_3b/original/consolidated.00.pth", True),
        ("data/pdfs/mine.dvc", False),
        ("data/pdfs/.gitignore", False),
        ("data/pdfs/mine/paper.pdf.dvc", False),
        ("data/pdfs/mine/.gitignore", False),
        ("models/source/llama_3b.dvc", False),
        ("data/pdfs/demo/science/paper.pdf", False),
        ("models/source/demo/params.json", False),
    ],
)
def test_git_has_no_documents_and_weights_but_the_demo_s(tmp_path, path, ignored):
    """`dvc exp run` commits what a stage depends on, gated weights too, unless DVC has it or git ignores it."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    Git.init(str(tmp_path)).close()
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()

    status = subprocess.run(["git", "status", "--short", "--untracked-files=all"], cwd=tmp_path, capture_output=True)
    with closing(Git(str(tmp_path))) as git:
        assert git.is_ignored(str(tmp_path / path)) == ignored
    assert (path not in status.stdout.decode()) == ignored


def test_a_checkpoint_hashes_alike_whenever_it_was_downloaded(tmp_path, monkeypatch):
    """`hf download` leaves a folder of its own, with times in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    notes = tmp_path / "models/source/llama_3b/.cache/huggingface/download/config.json.metadata"
    notes.parent.mkdir(parents=True)
    (tmp_path / "models/source/llama_3b/config.json").touch()
    hashes = []
    with closing(Repo.init(no_scm=True)) as repo:
        for time in ("1795721921.5", "1795721922.5"):
            notes.write_text(time)
            (stage,) = repo.add("models/source/llama_3b")
            hashes.append((stage.outs[0].hash_info.value, stage.outs[0].meta.nfiles))

    assert hashes[0] == hashes[1]
    assert hashes[0][1] == 1


def test_converted_weights_are_not_pushed():
    assert STAGES["convert"]["outs"] == [{"models/base": {"push": False}}]


@pytest.mark.parametrize("stage", DATA_STAGES)
def test_stages_without_a_model_do_not_import_torch(stage):
    for file in {f"stages/{stage}.py"} | imported_modules(ROOT / f"stages/{stage}.py"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "transformers")}, file


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"])
def test_requirements_are_pinned(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]

    assert all(re.fullmatch(r"-r \S+|[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in lines if line)


def test_conda_takes_the_same_python_and_packages():
    environment = YAML(typ="safe").load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    *packages, pip = environment["dependencies"]
    (python,) = (package.removeprefix("python=") for package in packages if package.startswith("python="))
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]

    assert pip == {"pip": ["-r requirements.txt"]}
    assert f"{python}.0" in SpecifierSet(allowed)


def test_the_readme_tree_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [path for folder in ("pdf2lora", "stages") for path in (ROOT / folder).glob("*.py")]

    assert not [path.name for path in modules if path.name != "__init__.py" and path.name not in readme]
    assert re.search(r"\bkernels/", readme)


def test_an_experiment_changes_no_other_line_of_params(tmp_path):
    """DVC writes the whole file anew, in its own style: params.yaml is in it, so that git diff shows the experiment."""
    before = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(before, encoding="utf-8")

    apply_overrides(tmp_path / "params.yaml", ["lora.r=16"])

    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == before.replace("  r: 8\n", "  r: 16\n") != before


def test_no_setting_has_a_default_in_code():
    def fields(section: Any) -> list[Any]:
        return [field for field in section.model_fields.values()]

    sections = [Params, *(f.annotation for f in fields(Params) if hasattr(f.annotation, "model_fields"))]

    assert all(field.is_required() for section in sections for field in fields(section))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))])
def test_settings_that_the_docs_name_exist(page):
    """After -S, or as `section.key` or "section.key"."""
    params = read_params(ROOT / "params.yaml").model_dump()
    sections = "|".join(name for name, section in params.items() if isinstance(section, dict) and name != "models")
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"-S '?([\w.]+)=", text) + re.findall(rf"[`\"]((?:{sections})\.[a-z]\w*)\b(?!\.)", text)

    unknown = []
    for name in named:
        section, _, key = name.partition(".")
        if section not in params or (key and key not in params[section]):
            unknown.append(name)
    assert not unknown


class TestDemo:
    def test_corpus_is_small_and_shows_the_reasons(self, tmp_path, monkeypatch):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DVC_ROOT", str(tmp_path))
        files = extract.find_pdfs(Path("data/pdfs/demo"))
        monkeypatch.setattr(extract, "DOCUMENTS", tmp_path / "documents.jsonl")
        monkeypatch.setattr(extract, "METRICS", tmp_path / "extract.json")

        extract.main()

        documents = read_documents(tmp_path / "documents.jsonl")
        kept = [document for document in documents if document.reason is None]
        left_out = {document.id.split("/")[-1]: document.reason for document in documents if document.reason}
        assert sum(file.stat().st_size for file in files) < 6e6
        assert len(kept) >= 36
        assert sum(len(document.text.split()) for document in kept) > 40_000
        assert left_out == {
            "04-cryosphere.pdf": Reason.DUPLICATE,  # its exact copy in hard-cases comes first
            "broken.pdf": Reason.DAMAGED,
            "cover-only.pdf": Reason.TOO_SHORT,
            "encrypted.pdf": Reason.ENCRYPTED,
            "scanned.pdf": Reason.NO_TEXT_LAYER,
            "unmapped-font.pdf": Reason.UNREADABLE_FONT,
        }
        assert not [d.id for d in kept if re.search("[\x00-\x08\x0b-\x1f\ufb00-\ufb06\ufffd]", d.text)]
        assert not [d.id for d in kept if re.search(r"Page \d+ of \d+", d.text)]

    def test_model_is_small_and_was_measured_on_held_out_books(self):
        folder = ROOT / "models/source/demo"
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))

        assert sum(file.stat().st_size for file in folder.iterdir()) < 14e6
        assert 4.5e6 < training["num_parameters"] < 5.5e6
        assert 20 < training["held_out"]["perplexity"] < 40

    def test_adapting_lowers_the_committed_test_perplexity(self):
        metrics = json.loads((ROOT / "metrics/eval.json").read_text(encoding="utf-8"))

        assert metrics["improvement"]["share"] > 0.1
        assert metrics["improvement"]["low_95"] > 0
        assert metrics["adapted"]["perplexity"] < metrics["base"]["perplexity"]
