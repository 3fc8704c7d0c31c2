"""The previous run: its params and dependencies in dvc.lock, its batch search, its speed on this machine."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pdf2lora.params import Params
from pdf2lora.paths import BASE, CORPORA, SOURCE_MODELS, SPLIT_DOCUMENTS

TOKENIZER = BASE / "tokenizer.json"
IGNORED = ".cache"  # of a source model, by .dvcignore


@dataclass(frozen=True)
class PreviousRun:
    """The files of the previous run. The methods check whether it had the current params, corpus and model."""

    params: Params
    """Of the current params.yaml."""
    stages: dict[str, Any]
    """Of dvc.lock."""
    machine: dict[str, Any]
    """metrics/machine.json."""
    batch: dict[str, Any]
    """metrics/batch.json."""
    split: dict[str, Any] = field(default_factory=dict)
    """metrics/split.json."""

    @classmethod
    def read(cls, params: Params) -> "PreviousRun":
        """Reads the files in the project's folder. A missing file counts as empty."""
        lock = Path("dvc.lock")
        locked = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) if lock.exists() else {}
        metrics = [_read_metrics(name) for name in ("machine", "batch", "split")]
        return cls(params, locked.get("stages", {}), *metrics)

    def ran_with_same_params(self, stage: str) -> bool:
        """Whether the last run of a stage had the same params as params.yaml now."""
        locked = self.locked_params(stage)
        current = self.params.model_dump()
        return bool(locked) and all(_value_at(current, key) == value for key, value in locked.items())

    def locked_params(self, stage: str) -> dict[str, Any]:
        """{key (`lora`, `train.optim`): value} of the last run of a stage; empty if it never ran."""
        return dict(self.stages.get(stage, {}).get("params", {}).get("params.yaml", {}))

    @property
    def has_current_text(self) -> bool:
        """Whether data/split has the text of this corpus with these params."""
        return (
            self._depended_on("extract", CORPORA / self.params.corpus)
            and self.ran_with_same_params("extract")
            and self.ran_with_same_params("split")
        )

    @property
    def has_current_tokens(self) -> bool:
        """Whether data/tokens has the tokens of this text in the tokenizer of this base model."""
        if not (self.has_current_text and self.has_current_base and TOKENIZER.exists()):
            return False
        outs = self.stages["split"].get("outs", ())
        split_md5 = [out["md5"] for out in outs if out["path"] == str(SPLIT_DOCUMENTS)]
        tokenizer_md5 = hashlib.md5(TOKENIZER.read_bytes()).hexdigest()
        deps = {dep["path"]: dep["md5"] for dep in self.stages.get("tokenize", {}).get("deps", ())}
        return [deps.get(str(SPLIT_DOCUMENTS)), deps.get(str(TOKENIZER))] == [*split_md5, tokenizer_md5]

    @property
    def has_current_base(self) -> bool:
        """Whether models/base was converted from the current source model."""
        return self._depended_on("convert", SOURCE_MODELS / self.params.model)

    @property
    def ran_with_same_seq_length(self) -> bool:
        """Whether the last training had sequences of the same length."""
        locked = self.locked_params("train").get("compute", {})
        return bool(locked.get("seq_length") == self.params.compute.seq_length)

    def _depended_on(self, stage: str, folder: Path) -> bool:
        """Whether the last run of a stage read this folder with as many files and bytes. Hashes would take too long."""
        files = [file for file in folder.rglob("*") if file.is_file() and IGNORED not in file.parts]
        current = {"path": str(folder), "size": sum(file.stat().st_size for file in files), "nfiles": len(files)}
        return any(current.items() <= dep.items() for dep in self.stages.get(stage, {}).get("deps", ()))


def _read_metrics(name: str) -> dict[str, Any]:
    file = Path(f"metrics/{name}.json")
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
