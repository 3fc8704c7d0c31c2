"""The table of benchmarks/scaling.py."""

from typing import Any

import pytest

from benchmarks.scaling import scaling_table


def machine(num_processes: int, tokens_per_s: int, **numbers: Any) -> dict[str, Any]:
    return {"train": {"num_processes": num_processes, "step_tokens_per_s": tokens_per_s, **numbers}}


def test_the_share_is_of_n_times_one_process() -> None:
    machines = [machine(4, 3600), machine(1, 1000, peak_reserved_gib=20.5), machine(2, 1900)]

    assert scaling_table(machines).splitlines()[2:] == [
        "| 1 | 1,000 | 100.0% | 20.5 |",
        "| 2 | 1,900 | 95.0% |  |",
        "| 4 | 3,600 | 90.0% |  |",
    ]


@pytest.mark.parametrize("counts", [[2, 4], [1, 1], []])
def test_one_run_must_have_one_process(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="one process"):
        scaling_table([machine(count, 1000) for count in counts])
