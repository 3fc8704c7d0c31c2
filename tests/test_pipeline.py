"""dvc.yaml, params.yaml, requirements and documentation agree with the code."""

import ast
import json
import re
import shutil
import subprocess
import tomllib
from contextlib import closing
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
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
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]


# Code that stages import and that cannot change an output. No stage depends on it.
PLUMBING = {
    "pdf2lora/cluster": "the machines that run the tasks; it compares their code and packages",
    "pdf2lora/errors.py": "error messages",
    "pdf2lora/params.py": "validation; the values are params of the stage",
    "pdf2lora/paths.py": "a path that changes also changes in dvc.yaml",
    "pdf2lora/runtime": "files, locks, processes, monitoring",
    "pdf2lora/training/throughput.py": "tokens/s of one machine",
    "pdf2lora/training/tracking.py": "log lines, and curves of numbers that the training loop computes",
}
LAYERS = (  # from low to high: a module imports only its own layer and lower ones
    "errors",
    "paths",
    "families",
    "runtime",
    "params",
    "tokens",
    "token_files",
    "token_cache",
    "documents",
    "split",
    "cluster",
    "weights",
    "model",
    "evaluation",
    "training",
    "report",
    "preflight",
)
PROJECT = ("pdf2lora", "stages", "commands", "benchmarks", "demo", "tests")


@cache
def direct_imports(file: Path, root: Path = ROOT) -> frozenset[str]:
    """Files of this project that a file imports, as paths from the root.

    Includes imports inside functions, `if TYPE_CHECKING` blocks, and module names in strings.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import in line {node.lineno}"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"pdf2lora(\.\w+)+", str(node.value)):
            names.add(str(node.value))
    paths = {name.replace(".", "/") + suffix for name in names for suffix in (".py", "/__init__.py")}
    return frozenset(path for path in paths if path.split("/")[0] in PROJECT and (root / path).exists())


def imported_code(file: Path, root: Path = ROOT) -> set[str]:
    """Files that a file imports, directly or through others, without plumbing and `__init__.py`."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        for path in direct_imports(waiting.pop(), root) - found:
            if not is_plumbing(path) and not path.endswith("__init__.py"):
                found.add(path)
                waiting.append(root / path)
    return found


def is_plumbing(path: str) -> bool:
    return any(path == entry or path.startswith(f"{entry}/") for entry in PLUMBING)


def code_of(dep: str, root: Path = ROOT) -> set[str]:
    """The Python files of a dependency: a file, or all files of a code folder. Empty for data."""
    if dep.startswith("pdf2lora/") and (root / dep).is_dir():
        return {str(file.relative_to(root)) for file in (root / dep).rglob("*.py") if file.name != "__init__.py"}
    return {dep} if dep.endswith(".py") else set()


def dependency_errors(stage: str, deps: list[str], root: Path = ROOT) -> list[str]:
    """Differences between a stage's dependencies and its imports.

    Every imported file must be covered. A listed file must be imported. A listed folder must have an imported file.
    """
    imported = {f"stages/{stage}.py"} | imported_code(root / f"stages/{stage}.py", root)
    covered = {file for dep in deps for file in code_of(dep, root)}
    unused = [dep for dep in deps if code_of(dep, root) and not code_of(dep, root) & imported]
    return [f"not listed: {file}" for file in sorted(imported - covered)] + [f"not imported: {dep}" for dep in unused]


class TestDependencies:
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_stage_depends_on_the_code_that_it_imports(self, stage):
        assert dependency_errors(stage, STAGES[stage]["deps"]) == []

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_changed_message_in_the_plumbing_runs_no_stage_again(self, stage):
        covered = {file for dep in STAGES[stage]["deps"] for file in code_of(dep)}

        assert not [file for file in covered if is_plumbing(file)]

    @pytest.mark.parametrize("entry", PLUMBING)
    def test_plumbing_exists(self, entry):
        assert (ROOT / entry).exists()

    def test_packages_have_no_code_in_their_init_file(self):
        """No dependency list contains these files. pdf2lora/__init__.py only filters a log message."""
        for file in (ROOT / "pdf2lora").glob("*/**/__init__.py"):
            statements = ast.parse(file.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in statements), file

    def test_differences_are_found(self, tmp_path):
        """A small project: the stage imports model/a.py, which imports model/b.py in a function, and a string has c."""
        files = {
            "stages/train.py": "from pdf2lora.model import a\nfrom pdf2lora.errors import InputError\n",
            "pdf2lora/model/a.py": "def main():\n    import pdf2lora.model.b\n",
            "pdf2lora/model/b.py": "CHILD = 'pdf2lora.training.c'\n",
            "pdf2lora/training/c.py": "",
            "pdf2lora/tokens.py": "",
            "pdf2lora/errors.py": "",
        }
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        complete = ["stages/train.py", "pdf2lora/model", "pdf2lora/training/c.py"]

        assert dependency_errors("train", complete, tmp_path) == []
        assert dependency_errors("train", complete[:2], tmp_path) == ["not listed: pdf2lora/training/c.py"]
        assert dependency_errors("train", [*complete, "pdf2lora/tokens.py"], tmp_path) == [
            "not imported: pdf2lora/tokens.py"
        ]
        assert dependency_errors("train", [complete[0], "pdf2lora/model/a.py", complete[2]], tmp_path) == [
            "not listed: pdf2lora/model/b.py"
        ]


class TestLayers:
    def test_every_folder_and_module_has_a_layer(self):
        entries = [path for path in (ROOT / "pdf2lora").iterdir() if path.name not in ("__init__.py", "__pycache__")]

        assert {path.stem for path in entries} == set(LAYERS)

    def test_imports_go_from_high_layers_to_low_ones(self):
        assert [edge for edge in module_edges() if LAYERS.index(layer(edge[1])) > LAYERS.index(layer(edge[0]))] == []

    def test_folders_have_no_import_cycle(self):
        graph: dict[str, set[str]] = {}
        for importer, imported in module_edges():
            if layer(importer) != layer(imported):
                graph.setdefault(layer(importer), set()).add(layer(imported))

        assert "runtime" in graph["training"]  # the graph is not empty
        TopologicalSorter(graph).prepare()  # raises CycleError

    @pytest.mark.parametrize("folder", ["pdf2lora", "stages", "commands", "benchmarks", "demo"])
    def test_only_tests_import_stages_and_nothing_imports_tests(self, folder):
        files = [file for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py"]
        imports = [(str(file.relative_to(ROOT)), path) for file in files for path in direct_imports(file)]

        assert files
        assert [edge for edge in imports if edge[1].split("/")[0] in ("stages", "tests")] == []

    def test_the_library_imports_only_itself(self):
        files = list((ROOT / "pdf2lora").rglob("*.py"))

        assert {path.split("/")[0] for file in files for path in direct_imports(file)} == {"pdf2lora"}


def module_edges() -> list[tuple[str, str]]:
    """(importer, imported) for all modules of pdf2lora, without `__init__.py`."""
    files = [file for file in (ROOT / "pdf2lora").rglob("*.py") if file.name != "__init__.py"]
    return [
        (str(file.relative_to(ROOT)), path)
        for file in files
        for path in direct_imports(file)
        if path.startswith("pdf2lora/") and not path.endswith("__init__.py")
    ]


def layer(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_everywhere(stage):
    docstring = ast.get_docstring(ast.parse((ROOT / f"stages/{stage}.py").read_text(encoding="utf-8"))) or ""

    assert re.match(rf"{stage}: .+ -> .+", docstring)
    assert STAGES[stage]["cmd"].endswith(f"-m stages.{stage}")
    assert STAGES[stage]["desc"]


def test_every_stage_file_is_a_stage():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} == set(STAGES)


def params_of(stage: str) -> list[str]:
    """The params of a stage in params.yaml; `params.yaml:` in dvc.yaml means all sections."""
    params = STAGES[stage].get("params", [])
    return list(Params.model_fields) if {"params.yaml": None} in params else [p for p in params if isinstance(p, str)]


@pytest.mark.parametrize("stage", STAGES)
def test_params_of_a_stage_exist_and_include_its_own_section(stage):
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


def test_the_cluster_re_runs_no_stage_that_makes_data():
    assert {stage for stage in STAGES if "cluster" in params_of(stage)} == {"check", "report"}


@pytest.mark.parametrize("stage", STAGES)
def test_small_results_are_in_git_and_not_in_the_cache(stage):
    for kind in ("metrics", "plots"):
        for entry in STAGES[stage].get(kind, []):
            assert entry[next(iter(entry))]["cache"] is False
    plain = [entry for entry in STAGES[stage].get("outs", []) if isinstance(entry, dict)]
    assert not [entry for entry in plain if "cache" in entry[next(iter(entry))]]  # else DVC's run-cache does not work


def test_machine_metrics_are_not_an_output_of_a_stage():
    assert not [stage for stage in STAGES.values() if "machine" in str(stage.get("metrics")) + str(stage.get("plots"))]


def test_dvc_draws_each_curve_once():
    """DVC would draw a file again if it were also in a plot of its stage."""
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
def test_git_ignores_documents_and_weights_except_the_demo(tmp_path, path, ignored):
    """Otherwise `dvc exp run` commits a stage's dependencies to git, gated weights too."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    Git.init(str(tmp_path)).close()
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()

    status = subprocess.run(["git", "status", "--short", "--untracked-files=all"], cwd=tmp_path, capture_output=True)
    with closing(Git(str(tmp_path))) as git:
        assert git.is_ignored(str(tmp_path / path)) == ignored
    assert (path not in status.stdout.decode()) == ignored


def test_the_hash_of_a_source_model_does_not_depend_on_the_download(tmp_path, monkeypatch):
    """`hf download` adds a folder .cache with times."""
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
    for file in {f"stages/{stage}.py"} | imported_code(ROOT / f"stages/{stage}.py"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "transformers")}, file


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "requirements-gpu.txt", "requirements-cluster.txt"]
)
def test_requirements_are_pinned(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]

    assert all(re.fullmatch(r"-r \S+|[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in lines if line)


def test_the_lock_has_every_requirement_at_its_version_with_hashes():
    """torch is not in the lock: its build depends on the machine. `make lock` writes the file."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", lock, re.MULTILINE))
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = dict(line.split("==") for line in lines if line)

    assert {name: locked.get(canonicalize_name(name)) for name in wanted} == wanted | {"torch": None}
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=[a-z])", lock.strip()))
    assert "://" not in lock
    assert "index" not in lock


def test_conda_environment_has_the_same_python_and_packages():
    environment = YAML(typ="safe").load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    *packages, pip = environment["dependencies"]
    (python,) = (package.removeprefix("python=") for package in packages if package.startswith("python="))
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]

    assert pip == {"pip": ["-r requirements.txt"]}
    assert f"{python}.0" in SpecifierSet(allowed)


def test_the_readme_tree_has_every_folder():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [path.name for path in (ROOT / "pdf2lora").iterdir() if path.is_dir() and path.name != "__pycache__"]

    assert not [name for name in folders if not re.search(rf"^ +{name}/ ", readme, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_in_the_docs_exist(page):
    """Relative links, and paths to code or tests in backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:pdf2lora|stages|commands|demo|benchmarks|tests|docs)/[\w./-]+)`", text)

    assert not [link for link in links if link and not ((ROOT / page).parent / link).exists()]
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_an_experiment_changes_no_other_line_of_params(tmp_path):
    """DVC rewrites the whole file in its style. params.yaml has that style, so git diff shows only the experiment."""
    before = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(before, encoding="utf-8")

    apply_overrides(tmp_path / "params.yaml", ["lora.r=16"])

    after = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [(old.split()[:2], new.split()[:2]) for old, new in changed] == [(["r:", "8"], ["r:", "16"])]


def test_no_setting_has_a_default_in_code():
    def fields(section: Any) -> list[Any]:
        return [field for field in section.model_fields.values()]

    sections = [Params, *(f.annotation for f in fields(Params) if hasattr(f.annotation, "model_fields"))]

    assert all(field.is_required() for section in sections for field in fields(section))


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_the_docs_exist(page):
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
    def test_corpus_is_small_and_has_documents_for_most_reasons(self, tmp_path, monkeypatch, one_core):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DVC_ROOT", str(tmp_path))
        files = list(Path("data/pdfs/demo").rglob("*.pdf"))
        monkeypatch.setattr(extract, "DOCUMENTS", tmp_path / "documents.jsonl")
        monkeypatch.setattr(extract, "METRICS", tmp_path / "extract.json")

        extract.main()

        documents = list(read_documents(tmp_path / "documents.jsonl"))
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
