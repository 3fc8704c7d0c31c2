"""The result of one check."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "problem"]
    """note: the run works, but could do more. problem: the run would fail."""
    subject: str
    text: str


def has_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)
