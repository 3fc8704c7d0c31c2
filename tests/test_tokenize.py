"""The stage tokenize, and when DVC runs it again."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import REPOSITORY, prose
from ruamel.yaml import YAML
from tiny_llama import write_texts, write_tiny_llama
from tiny_meta import rewrite_json

from pdf2lora.documents.records import SPLITS
from pdf2lora.token_files import TokenFile
from pdf2lora.tokens import Encoder
from stages import tokenize

TEXTS = {"train": [prose(1), prose(2)], "validation": [], "test": [prose(3)]}


@pytest.fixture
def project(tmp_path, monkeypatch, write_params):
    monkeypatch.chdir(tmp_path)
    write_params()
    monkeypatch.delenv("DVC_ROOT", raising=False)
    write_tiny_llama(tmp_path / "models/base")
    for name, texts in TEXTS.items():
        write_texts(tmp_path / f"data/split/{name}.jsonl", texts)
    return tmp_path


@pytest.mark.usefixtures("project")
def test_writes_the_tokens_of_each_split_and_their_number(capsys):
    tokenize.main()

    encoder = Encoder.load(Path("models/base"))
    for name in SPLITS:
        documents = TokenFile.open(Path("data/tokens"), name).documents()
        assert [encoder.tokenizer.decode(tokens.tolist()) for tokens in documents] == TEXTS[name]
    counts = {name: {"documents": len(texts), "tokens": sum(map(len, texts))} for name, texts in TEXTS.items()}
    assert json.loads(Path("metrics/tokenize.json").read_text()) == counts
    assert f"tokenize: {counts['train']['tokens']:,} train, 0 validation" in capsys.readouterr().out


@pytest.mark.usefixtures("project")
def test_missing_inputs_are_reported_in_one_line():
    shutil.rmtree("data/split")

    with pytest.raises(SystemExit, match=r"error: data/split does not exist"):
        tokenize.main()


def test_the_replay_text_is_tokenized_too(project, write_params):
    write_params({"train.replay": "books"})
    (project / "data/replay/books").mkdir(parents=True)
    (project / "data/replay/books/a.txt").write_text(prose(7))
    (project / "data/general").mkdir()
    (project / "data/general/general.txt").write_text(prose(8, 60))

    tokenize.main()

    (tokens,) = TokenFile.open(Path("data/tokens"), "replay").documents()
    assert Encoder.load(Path("models/base")).tokenizer.decode(tokens.tolist()) == prose(7)
    assert json.loads(Path("metrics/tokenize.json").read_text())["replay"]["documents"] == 1
    (project / "data/replay/books/b.txt").write_text(prose(8, 60))
    with pytest.raises(SystemExit, match=r"100\.0% of the 13-word sequences of the general text"):
        tokenize.main()
    (project / "data/replay/books/b.txt").write_text(TEXTS["test"][0])
    with pytest.raises(SystemExit, match=r"% of the 13-word sequences of the test documents"):
        tokenize.main()


@pytest.fixture
def changed(project):
    """Whether DVC would run tokenize again, after a run of the stage on this project."""
    from dvc.repo import Repo

    stage = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["tokenize"]
    stage["deps"] = [dep for dep in stage["deps"] if not dep.startswith(("pdf2lora/", "stages/"))]
    stage["cmd"] = "true"
    for folder in ("data/general", "data/replay"):
        (project / folder).mkdir()
    YAML(typ="safe").dump({"stages": {"tokenize": stage}}, project / "dvc.yaml")
    tokenize.main()
    with Repo.init(no_scm=True) as repo:
        repo.commit(force=True)
        yield lambda: "tokenize" in repo.status()


def test_only_the_text_and_the_tokenizer_run_it_again(changed, write_params):
    base = Path("models/base")
    write_params({"compute.seq_length": 64})
    rewrite_json(base / "config.json", rope_theta=1.0)
    (base / "model.safetensors").write_bytes(b"other weights")
    assert not changed()

    for file in (base / "tokenizer.json", Path("data/split/test.jsonl")):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert changed()
        file.write_bytes(content)
    assert not changed()

    rewrite_json(base / "config.json", eos_token_id=[1, 2])
    assert changed()
