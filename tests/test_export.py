"""export on a tiny model: the merged model, the released adapter, the errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dvc.repo import Repo
from example_run import write_run
from helpers import prose
from safetensors.torch import load_file
from tiny_llama import COMPUTE, LORA, QUANTIZATION, changed, quiet, write_split
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import export
from pdf2lora.model.initialization import initialize
from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.manifest import MANIFEST, find_damage

pytestmark = quiet
SETTINGS = {"compute.seq_length": 32, "evaluate.stride": 16}


@pytest.fixture
def project(tmp_path, monkeypatch, write_params, models):
    """The files of a project after `dvc repro` that export reads."""
    monkeypatch.chdir(tmp_path)
    write_params(SETTINGS)
    write_run(tmp_path)
    write_split(tmp_path, "test", [prose(1, 30), prose(2, 12)], models / "base")
    for name in ("base", "adapter"):
        shutil.copytree(models / name, tmp_path / "models" / name)
    return tmp_path


@pytest.fixture
def current(monkeypatch):
    monkeypatch.setattr(export, "require_current_adapter", lambda: None)


def test_writes_a_model_that_transformers_loads_and_an_adapter_with_its_card(project, current, capsys):
    export.main()

    AutoModelForCausalLM.from_pretrained("models/merged")
    assert AutoTokenizer.from_pretrained("models/merged")("sea").input_ids
    measured = json.loads((project / "models/merged/perplexity.json").read_text())
    row = f"| unquantized base with the merged adapter | {measured['merged']['perplexity']:.2f} |"
    assert row in (project / "models/merged/README.md").read_text(encoding="utf-8")
    assert row in (project / "models/adapter_release/README.md").read_text(encoding="utf-8")
    assert f"test perplexity {measured['merged']['perplexity']:.2f} (merged), 15.00" in capsys.readouterr().out
    released = project / "models/adapter_release"
    card = (released / "README.md").read_text(encoding="utf-8")
    assert "# demo, adapted to demo\n" in card
    assert "library_name: peft" in card
    assert "More Information Needed" not in card
    weights = "adapter_model.safetensors"
    assert (released / weights).read_bytes() == (project / "models/adapter" / weights).read_bytes()
    assert len({file.stat().st_mode for file in released.iterdir()}) == 1


def test_the_merged_model_has_a_manifest(project, current):
    export.main()

    merged = project / "models/merged"
    assert find_damage(merged) is None
    files = json.loads((merged / MANIFEST).read_text())["files"]
    assert set(files) == {file.name for file in merged.iterdir()} - {MANIFEST}


def test_the_licence_is_copied(project, current):
    export.main()

    assert (project / "models/merged/LICENSE.txt").read_text() == "terms"
    assert (project / "models/adapter_release/LICENSE.txt").read_text() == "terms"


def test_does_not_change_the_adapter_of_the_pipeline(project, current):
    before = {file.name: file.read_bytes() for file in (project / "models/adapter").iterdir()}

    export.main()

    assert {file.name: file.read_bytes() for file in (project / "models/adapter").iterdir()} == before


def test_needs_an_adapter(project):
    shutil.rmtree("models/adapter")

    with pytest.raises(SystemExit, match="models/adapter has no adapter"):
        export.main()


def test_needs_an_adapter_of_the_current_settings(project):
    (project / "dvc.yaml").write_text("stages:\n  evaluate:\n    cmd: 'true'\n    deps: [params.yaml]\n")
    with Repo.init(no_scm=True) as repo:
        repo.reproduce()
    export.require_current_adapter()

    (project / "params.yaml").write_text("changed")

    with pytest.raises(export.InputError, match=r"does not belong to the current params\.yaml"):
        export.require_current_adapter()


def test_the_release_works_outside_the_project(project, current, tmp_path, monkeypatch, capsys):
    export.main()
    (tmp_path / "elsewhere").mkdir()
    shutil.move("models/adapter_release", tmp_path / "elsewhere/adapter_release")
    shutil.move("models/base", tmp_path / "elsewhere/base")
    monkeypatch.chdir(tmp_path / "elsewhere/adapter_release")
    card = Path("README.md").read_text(encoding="utf-8")
    snippet = card.split("```python\n")[1].split("```")[0].replace("path/to/base", "../base")

    exec(compile(snippet, "README.md", "exec"), {})

    assert "The sea level" in capsys.readouterr().out
    config = json.loads(Path("adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "demo"


def test_the_release_names_the_hub_id_of_the_base(project, current, write_params):
    write_params(SETTINGS | {"models.demo.hub_id": "someone/demo"})

    export.main()

    released = project / "models/adapter_release"
    assert json.loads((released / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/demo"
    assert 'BASE = "someone/demo"' in (released / "README.md").read_text(encoding="utf-8")


def test_an_adapter_of_another_base_becomes_an_ordinary_one(project, current, write_params):
    """pissa and loftq: merged model and released adapter are for the unquantized base."""
    lora = changed(LORA, init_lora_weights="pissa", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    write_params(SETTINGS | {f"lora.{key}": value for key, value in lora.model_dump().items()})
    model = add_lora(load_base(Path("models/base"), QUANTIZATION, COMPUTE), lora)
    shutil.rmtree("models/adapter")
    alone = Processes.alone(torch.device("cpu"))
    initialize(model, Path("models/base"), lora, seed=0, folder=Path("models/adapter/initial"), processes=alone)
    model.save_pretrained("models/adapter")

    export.main()

    merged, base = (load_file(f"models/{name}/model.safetensors") for name in ("merged", "base"))
    assert all(torch.allclose(merged[name], base[name], atol=1e-5) for name in base)  # it was not trained
    released = json.loads(Path("models/adapter_release/adapter_config.json").read_text())
    assert (released["r"], released["lora_alpha"], released["init_lora_weights"]) == (8, 32, True)
    assert "initial" not in {path.name for path in Path("models/adapter_release").iterdir()}
    card = Path("models/adapter_release/README.md").read_text(encoding="utf-8")
    assert "BitsAndBytesConfig" not in card
