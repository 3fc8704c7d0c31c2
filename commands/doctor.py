"""doctor: params.yaml, the folders that it names, this machine -> what is wrong, and what the run will take

Looks before any work is done, in two seconds: nothing is trained or converted, and torch is imported only where this
machine may give back other weights than it stored in 4 bits, which takes five seconds more. Ends with status 1 if
something would make the run fail.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import Params, read_params
from pdf2lora.preflight import environment, forecast
from pdf2lora.preflight.environment import Finding, Gpu
from pdf2lora.preflight.folders import CORPORA, SOURCES, require_folder
from pdf2lora.preflight.forecast import Before, Estimate, Shape
from pdf2lora.report.results import find_licences

REQUIREMENTS = Path("requirements.txt")
TRAIN = Path("data/split/train.jsonl")
TOKENIZER = Path("models/base/tokenizer.json")
BLOCK = 64  # weights that share a scale in 4 bits
LIBRARIES_GIB = 1.5  # torch, transformers and the rest, in memory


@report_input_errors
def main() -> None:
    params = read_params()
    require_folder("corpus", CORPORA / params.corpus, "put your PDFs there")
    require_folder("model", SOURCES / params.model, "put the checkpoint there")
    gpus = environment.find_gpus()
    pdfs = sorted(path for path in (CORPORA / params.corpus).rglob("*") if path.suffix.lower() == ".pdf")
    before = Before(params, lock=read_lock(), machine=read_json("machine"), batch=read_json("batch"))

    machine = [
        environment.python_version(),
        environment.packages(REQUIREMENTS),
        environment.gpu(gpus),
        environment.torch_build(gpus),
        environment.bitsandbytes(params.quantization.bits, gpus),
        environment.flash_attention(params.compute.attention, gpus),
    ]
    findings = [corpus(params, pdfs), *checkpoint(SOURCES / params.model)]
    estimates: list[Estimate] = []
    if not has_problem(findings):
        shape = forecast.read_shape(SOURCES / params.model)
        estimates = predict(params, before, shape, gpus, pdfs)
        findings += [
            environment.memory(LIBRARIES_GIB + (0 if gpus else shape.base_gib(params.quantization))),
            environment.disk(Path(), forecast.disk_gib(before, shape)),
        ]
        if not has_problem(machine):
            findings += weights_in_4_bits(params, shape, gpus)
    findings = [Finding("ok", "params", "params.yaml is valid"), *machine, *findings]

    for finding in findings:
        print(f"{finding.level:<8} {finding.subject:<13} {finding.text}")
    if estimates:
        print("\nthis run")
    for estimate in estimates:
        print(f"  {estimate.what:<10} {estimate.text}\n  {'':<10} {estimate.how}: {estimate.why}")
    if has_problem(findings):
        sys.exit(1)


def has_problem(findings: list[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def read_lock() -> dict[str, Any]:
    lock = Path("dvc.lock")
    return dict(YAML(typ="safe").load(lock.read_text(encoding="utf-8"))) if lock.exists() else {}


def read_json(name: str) -> dict[str, Any]:
    file = Path(f"metrics/{name}.json")
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def corpus(params: Params, pdfs: list[Path]) -> Finding:
    if not pdfs:
        return Finding("problem", "corpus", f"{CORPORA / params.corpus} holds no file that ends in .pdf")
    mebibytes = sum(pdf.stat().st_size for pdf in pdfs) / 2**20
    return Finding("ok", "corpus", f"{CORPORA / params.corpus}: {len(pdfs):,} PDFs, {mebibytes:,.1f} MiB")


def checkpoint(folder: Path) -> list[Finding]:
    """The layout, whether the files that belong to it are there, and the licence."""
    layouts = {
        "Meta's": ("params.json", "*.pth", "tokenizer.model"),
        "Hugging Face's": ("config.json", "*.safetensors", "tokenizer.json"),
    }
    found = next((name for name, files in layouts.items() if (folder / files[0]).exists()), None)
    if found is None:
        has, remedy = "has neither params.json nor config.json", "fetch all its files"
        if (folder / "original" / layouts["Meta's"][0]).exists():  # where the Hugging Face hub keeps Meta's files
            has, remedy = "has Meta's files in original", f"mv {folder / 'original'}/* {folder}"
        return [Finding("problem", "checkpoint", f"{folder} {has}; {remedy}")]
    missing = [pattern for pattern in layouts[found] if not list(folder.glob(pattern))]
    if missing:
        return [Finding("problem", "checkpoint", f"{folder} has no {', no '.join(missing)}; fetch all its files")]
    gib = sum(file.stat().st_size for file in folder.glob(layouts[found][1])) / 2**30
    licences = find_licences(folder)
    return [
        Finding("ok", "checkpoint", f"{folder}: {found} layout, {gib:.2f} GiB of weights"),
        Finding("ok", "licence", f"{', '.join(licences)} in {folder}")
        if licences
        else Finding("note", "licence", f"no file of that kind in {folder}: know the terms before you share a model"),
    ]


def weights_in_4_bits(params: Params, shape: Shape, gpus: list[Gpu]) -> list[Finding]:
    """Whether the stages would refuse the model's widths, by their own check; nothing where that cannot fail."""
    widths = {inputs for inputs, _ in shape.layers.values()}
    if gpus or params.quantization.bits != 4 or not any(width % BLOCK for width in widths):
        return []
    from pdf2lora.model.device import compute_dtype  # imports torch
    from pdf2lora.model.quantization import check_4bit_round_trip

    try:
        check_4bit_round_trip(widths, params.quantization.bnb_4bit_quant_type, compute_dtype(params.compute))
    except InputError as error:
        return [Finding("problem", "4-bit weights", str(error))]
    return [Finding("ok", "4-bit weights", "are given back as they were stored")]


def predict(params: Params, before: Before, shape: Shape, gpus: list[Gpu], pdfs: list[Path]) -> list[Estimate]:
    tokens, how, why = training_tokens(params, before, pdfs)
    num_sequences = -(-tokens // params.compute.seq_length)
    effective = params.train.effective_batch
    if effective == "auto":
        effective = before.batch.get("effective_batch", "auto")
    made = [
        Estimate("sequences", f"{num_sequences:,} of {params.compute.seq_length} tokens to train on", how, why),
    ]
    if isinstance(effective, int):
        num_steps = forecast.steps(num_sequences, effective, params.train.num_train_epochs)
        rule = f"sequences / effective batch {effective} x {params.train.num_train_epochs:g} epochs"
        made.append(Estimate("steps", f"{num_steps:,} optimizer steps", "computed", rule))
    else:
        made.append(Estimate("steps", "-", "unknown", "train.effective_batch is auto: find_batch will tell"))
    needed = forecast.disk_gib(before, shape)
    rule = (
        "models/base is there" if not needed else f"2 x {shape.num_bytes / 2**30:.2f} GiB, models/base and DVC's cache"
    )
    return [
        *made,
        forecast.memory_estimate(before, params, shape),
        forecast.time_estimate(before, params, shape, gpus, num_sequences * params.compute.seq_length),
        Estimate("disk", f"{needed:.2f} GiB more", "computed", rule),
    ]


def training_tokens(params: Params, before: Before, pdfs: list[Path]) -> tuple[int, forecast.How, str]:
    train_share = 1 - params.split.test_fraction - params.split.validation_fraction
    if before.text_is_current and TRAIN.exists():
        texts = [document.text for document in read_documents(TRAIN)]
        if before.base_is_current and TOKENIZER.exists():
            tokens, is_all = forecast.count_tokens(texts, TOKENIZER)
            part = (
                "" if is_all else f", the first {forecast.COUNTED_CHARACTERS:,} characters and the rest in proportion"
            )
            return tokens, "counted", f"{TRAIN} with the base's tokenizer{part}"
        characters = sum(len(text) for text in texts)
        rule = f"{characters:,} characters in {TRAIN}, {forecast.CHARACTERS_PER_TOKEN:g} a token"
        return round(characters / forecast.CHARACTERS_PER_TOKEN), "rule", rule
    pages = forecast.count_pages(pdfs, params.extract.max_pages)
    characters = round(pages * forecast.CHARACTERS_PER_PAGE * train_share)
    rule = (
        f"{pages:,} pages by pdfium, {forecast.CHARACTERS_PER_PAGE:,} characters a page, "
        f"{forecast.CHARACTERS_PER_TOKEN:g} a token, {train_share:.0%} to train on"
    )
    return round(characters / forecast.CHARACTERS_PER_TOKEN), "rule", rule


if __name__ == "__main__":
    main()
