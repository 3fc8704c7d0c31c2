"""The files of the source model: the layout, missing files, the licence."""

from pathlib import Path

from pdf2lora.preflight.findings import Finding
from pdf2lora.report.results import find_licences

GIB = 2**30
LAYOUTS = {  # name: the file that shows it, the weights, the tokenizer
    "Meta's": ("params.json", "*.pth", "tokenizer.model"),
    "Hugging Face's": ("config.json", "*.safetensors", "tokenizer.json"),
}


def source_model(folder: Path) -> list[Finding]:
    """Whether the folder has all files of one layout, and whether it has a licence."""
    layout = next((name for name, files in LAYOUTS.items() if (folder / files[0]).exists()), None)
    if layout is None:
        text = f"{folder} has neither params.json nor config.json. Download all files."
        if (folder / "original/params.json").exists():  # here the Hugging Face hub keeps Meta's files
            text = f"{folder} has Meta's files in original. Move them up: mv {folder}/original/* {folder}"
        return [Finding("problem", "source model", text)]
    missing = [pattern for pattern in LAYOUTS[layout] if not list(folder.glob(pattern))]
    if missing:
        text = f"{folder} has no {', no '.join(missing)}. Download all files."
        return [Finding("problem", "source model", text)]
    gib = sum(file.stat().st_size for file in folder.glob(LAYOUTS[layout][1])) / GIB
    return [Finding("ok", "source model", f"{folder}: {layout} layout, {gib:.2f} GiB of weights"), _licence(folder)]


def _licence(folder: Path) -> Finding:
    licences = find_licences(folder)
    if licences:
        return Finding("ok", "licence", f"{', '.join(licences)} in {folder}")
    return Finding("note", "licence", f"{folder} has no licence file. Check the terms before you share a model.")
