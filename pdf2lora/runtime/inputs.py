"""Checks the inputs of a stage or command, for a user who starts it before the stages that write them."""

from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.runtime.scratch import pipeline_stages


def require_inputs_of(stage: str) -> None:
    """Checks that the dependencies of a stage exist, as far as other stages write them.

    Raises InputError if a dependency does not exist.
    """
    stages = pipeline_stages()
    require_inputs(*(Path(dep) for dep in stages[stage]["deps"] if _writer(dep, stages)))


def require_inputs(*paths: Path) -> None:
    """Raises InputError if a file or folder does not exist; the message has the command that makes it."""
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist. Make it with: dvc repro {_writer(str(path), pipeline_stages())}")


def _writer(path: str, stages: dict[str, Any]) -> str | None:
    """The stage that writes this path or a folder that contains it; None for code and for data of the user."""
    for name, stage in stages.items():
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, ())]
        outputs = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
        if any(path == output or path.startswith(f"{output}/") for output in outputs):
            return name
    return None
