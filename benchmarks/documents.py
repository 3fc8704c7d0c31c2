"""Measures time and memory of split, tokenize and report, or of extract, on synthetic corpora of different sizes.

    python -m benchmarks.documents <results.json> [<number of documents> ...]

Writes data/documents.jsonl of a project in a temporary folder (--folder selects where; 20,000 documents need 5 GB) and
runs the stages there, each in a new process, and split and tokenize a second time with one more document. The documents
are random phrases, 48,000 characters each; every twentieth one is an edited copy of the one before. `read` opens the
tokens as find_batch, train and evaluate do, and reads each token once in a random order.

With --extract it writes the texts as PDFs of 16 pages and runs extract, a second time with one more PDF. It needs
reportlab (requirements-dev.txt).

Needs the demo's outputs (make repro) for the base model and the report.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pdf2lora.documents.records import Document, read_documents
from pdf2lora.documents.text import text_sha256
from pdf2lora.runtime.files import write_json

PROJECT = Path(__file__).resolve().parents[1]
SIZES = (1_000, 5_000, 20_000)
NUM_CHARACTERS = 48_000
NUM_WORDS = 50_000  # of the synthetic language
NUM_PHRASES, PHRASE_WORDS = 200_000, 3
COPY_EVERY = 20
LINES_PER_PAGE = 41  # 16 pages
EDITED_SHARE = 0.02
EXTRAPOLATED = 100_000
READ = """
import numpy as np
from pdf2lora.paths import TOKENS
from pdf2lora.token_files import TokenFile
sequences = TokenFile.open(TOKENS, "train").sequences(512)
order = np.random.default_rng(0).permutation(len(sequences))
total = sum(int(sequences.batch(indices)[0].sum()) for indices in np.array_split(order, -(-len(order) // 64)))
windows = TokenFile.open(TOKENS, "test").windows(seq_length=512, stride=256)
total += sum(int(window.input_ids.sum()) for window in windows)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--split-only", action="store_true", help="leave out tokenize and report")
    parser.add_argument("--extract", action="store_true", help="measure extract, and no other stage")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{psutil.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB, {processor()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "tokenizers")}},
        "characters_per_document": NUM_CHARACTERS,
        "sizes": {},
    }
    for size in arguments.sizes:
        stages = results["sizes"][size] = {}
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            project = Path(folder)
            measured = (
                measure_extract(project, size) if arguments.extract else measure(project, size, arguments.split_only)
            )
            for name, numbers in measured:
                stages[name] = numbers
                print(size, name, numbers, flush=True)
                write_json(arguments.results, results)
        if len(results["sizes"]) > 1:
            results[f"extrapolated_to_{EXTRAPOLATED}"] = extrapolate(results["sizes"])
            write_json(arguments.results, results)


def measure(project: Path, size: int, split_only: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the numbers of each stage on a corpus of this size."""
    write_project(project)
    texts = synthetic_texts()
    stages = ("split",) if split_only else ("split", "tokenize")
    for num_texts, suffix in ((size, ""), (1, ", one document more")):
        append_documents(project, islice(texts, num_texts))
        for stage in stages:
            yield stage + suffix, run(project, "-m", f"stages.{stage}")
    if split_only:
        return
    yield "read", run(project, "-c", READ)
    write_results(project)
    numbers = run(project, "-m", "stages.report")
    yield "report", numbers | {"page_mib": round((project / "reports/index.html").stat().st_size / 2**20, 2)}


def measure_extract(project: Path, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for extract."""
    write_project(project)
    corpus = project / "data/pdfs/synthetic"
    corpus.mkdir()
    params = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(params.replace("corpus: demo", "corpus: synthetic", 1), encoding="utf-8")
    texts = synthetic_texts()
    for num_texts, suffix in ((size, ""), (1, ", one document more")):
        for text in islice(texts, num_texts):
            write_pdf(corpus / f"{text_sha256(text)[:20]}.pdf", text)
        yield "extract" + suffix, run(project, "-m", "stages.extract")


def write_pdf(path: Path, text: str) -> None:
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(path))
    lines = textwrap.wrap(text, 80)
    for first in range(0, len(lines), LINES_PER_PAGE):
        page = canvas.beginText(70, 780)
        for line in lines[first : first + LINES_PER_PAGE]:
            page.textLine(line)
        canvas.drawText(page)
        canvas.showPage()
    canvas.save()


def run(project: Path, *arguments: str) -> dict[str, Any]:
    """Runs Python in the project. Memory: of all its processes together, sampled; pages of files do not count."""
    before = os.times()
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peaks = {"anonymous_gib": 0.0, "resident_gib": 0.0}
    watch = threading.Thread(target=sample_memory, args=(process.pid, peaks), daemon=True)
    watch.start()
    output, _ = process.communicate()
    seconds, after = time.monotonic() - began, os.times()
    watch.join()
    if process.returncode:
        raise RuntimeError(output)
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    lines = output.strip().splitlines()
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_s, 1), **peaks, "line": lines[-1] if lines else ""}


def sample_memory(pid: int, peaks: dict[str, float]) -> None:
    """Keeps the largest sums over a process and its descendants, until it ends."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            anonymous, resident = 0, 0
            for member in (parent, *parent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    memory = member.memory_info()
                    anonymous += memory.rss - memory.shared
                    resident += memory.rss
            for name, value in (("anonymous_gib", anonymous), ("resident_gib", resident)):
                peaks[name] = max(peaks[name], round(value / 2**30, 3))
            time.sleep(0.1)


def write_project(project: Path) -> None:
    """The settings, models and PDFs of the demo."""
    shutil.copy(PROJECT / "params.yaml", project)
    (project / "data").mkdir()
    for name in ("models/base", "models/source/demo", "models/adapter", "data/pdfs/demo"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).symlink_to(PROJECT / name)


def append_documents(project: Path, texts: Iterable[str]) -> None:
    """Adds a record for each text to data/documents.jsonl."""
    with (project / "data/documents.jsonl").open("a", encoding="utf-8") as out:
        for text in texts:
            sha256 = text_sha256(text)
            document = Document(
                id=f"{sha256[:2]}/{sha256[2:20]}.pdf",
                sha256=sha256,
                num_pages=16,
                pages_read=16,
                engine="pdfium",
                attempts={"pdfium": "complete"},
                characters_raw=len(text),
                characters=len(text),
                reason=None,
                text=text,
            )
            out.write(json.dumps(vars(document)) + "\n")


def synthetic_texts() -> Iterator[str]:
    """Phrases of words with the frequencies of a natural language (Zipf)."""
    random = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvz" for vowel in "aeiou"]
    language = ["".join(random.choice(syllables, size=random.integers(1, 5))) for _ in range(NUM_WORDS)]
    shares = np.cumsum(1 / np.arange(1, NUM_WORDS + 1))
    ranks = np.searchsorted(shares / shares[-1], random.random((NUM_PHRASES, PHRASE_WORDS)))
    phrases = np.array([" ".join(language[rank] for rank in row) for row in ranks], dtype=object)
    chosen = phrases
    for number in count():
        if number % COPY_EVERY == 1:
            is_edited = random.random(len(chosen)) < EDITED_SHARE
            chosen = np.where(is_edited, random.permutation(chosen), chosen)
        else:
            chosen = random.choice(phrases, size=NUM_CHARACTERS // 12)
        yield " ".join(chosen)[:NUM_CHARACTERS]


def write_results(project: Path) -> None:
    """Copies the demo's results for the stage report. Each test document gets a row of eval_documents.csv."""
    measured = shutil.ignore_patterns("split.json", "tokenize.json", "eval_documents.csv")
    shutil.copytree(PROJECT / "metrics", project / "metrics", dirs_exist_ok=True, ignore=measured)
    for name in ("dvc.lock", "data/samples.json"):
        shutil.copy(PROJECT / name, project / name)
    header, row, *_ = (PROJECT / "metrics/eval_documents.csv").read_text(encoding="utf-8").splitlines()
    numbers = row.partition(",")[2]
    rows = [f"{document.id},{numbers}" for document in read_documents(project / "data/split/test.jsonl")]
    (project / "metrics/eval_documents.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def extrapolate(sizes: dict[int, Any]) -> dict[str, Any]:
    """Seconds and memory of a stage with EXTRAPOLATED documents, on the line through the two largest sizes."""
    (small, first), (large, second) = sorted(sizes.items())[-2:]
    keys = ("seconds", "cpu_seconds", "anonymous_gib")

    def at(stage: str, key: str) -> float:
        low, high = first[stage][key], second[stage][key]
        return round(float(high + (high - low) * (EXTRAPOLATED - large) / (large - small)), 2)

    return {stage: {key: at(stage, key) for key in keys} for stage in second}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
