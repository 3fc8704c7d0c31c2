import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest

from pdf2lora.errors import InputError
from pdf2lora.runtime import parallel
from pdf2lora.runtime.parallel import Workers, batches


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def end_by_signal(number: int) -> None:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_are_in_the_order_of_the_items(count: int) -> None:
    with Workers() as workers:
        assert [value for value, _ in workers.map(square, range(count))] == [n**2 for n in range(count)]


def test_a_single_item_needs_no_process() -> None:
    with Workers() as workers:
        assert list(workers.map(square, [3])) == [(9, os.getpid())]
        used = {pid for _, pid in workers.map(square, range(20))}
        assert os.getpid() not in used
        assert {pid for _, pid in workers.map(square, [3])} <= {process.pid for process in active_children()}
    assert not active_children()


def test_only_few_items_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "num_cores", lambda: 2)
    num_read = 0

    def items() -> Iterator[int]:
        nonlocal num_read
        for number in range(100):
            num_read += 1
            yield number

    with Workers() as workers:
        results = workers.map(square, items())
        for number in range(5):
            next(results)
            assert num_read <= number + 1 + 2 * parallel.ITEMS_PER_WORKER


def test_a_killed_process_is_reported_in_one_line() -> None:
    with Workers() as workers, pytest.raises(InputError, match="A worker process was killed"):
        list(workers.map(end_by_signal, range(5)))


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text(
        "import time\nfrom pdf2lora.runtime.parallel import Workers\n"
        "if __name__ == '__main__':\n    with Workers() as workers:\n"
        "        print(next(workers.map(time.sleep, [0] + 20 * [60])), flush=True)\n        time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children

        parent.kill()

    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_batches_have_at_most_max_characters() -> None:
    assert list(batches(["aa", "bb", "c", "dddddd", "e"], 4)) == [["aa", "bb"], ["c"], ["dddddd"], ["e"]]
    assert list(batches([])) == []
