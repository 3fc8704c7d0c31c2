"""The files of a finished run with invented numbers, for the tests of report and export."""

import json
from functools import cache
from pathlib import Path

from helpers import REPOSITORY, make_document, write_documents
from ruamel.yaml import YAML


@cache
def lock_of_the_data() -> str:
    """The data and models of the demo's dvc.lock, as one stage. Each report parses the text, so it is short."""
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.lock")["stages"].values()
    entries = {entry["path"]: entry for stage in stages for entry in (*stage["deps"], *stage["outs"])}
    deps = [entry for path, entry in entries.items() if path.startswith(("data/", "models/"))]
    return json.dumps({"schema": "2.0", "stages": {"convert": {"cmd": "true", "deps": deps}}})


def write_run(folder: Path, *, num_test: int = 4, num_validation: int = 1, improvement: float = 0.25) -> Path:
    """The outputs of the stages before report, of a run on a GPU."""
    names = [f"test-{n}.pdf" for n in range(num_test)]
    splits = {"train": ["a.pdf", "b.pdf"], "validation": ["v.pdf"][:num_validation], "test": names}
    documents = {name: make_document(name, f"text of {name} ") for ids in splits.values() for name in ids}
    excluded = make_document("<b>scan</b>.pdf", "", reason="no_text_layer", engine=None)
    (folder / "data/split").mkdir(parents=True)
    write_documents(folder / "data/documents.jsonl", [*documents.values(), excluded])
    for split, ids in splits.items():
        write_documents(folder / f"data/split/{split}.jsonl", [documents[name] for name in ids])
    source = folder / "models/source/demo"
    source.mkdir(parents=True)
    (source / "LICENSE.txt").write_text("terms")

    rows = [[name, 100, 400, 80, 20.0 + n, (20.0 + n) * (1 - improvement), improvement] for n, name in enumerate(names)]
    probes = [
        {"gradient_checkpointing": "none", "batch": 1, "fits": True, "peak_gib": 6.0},
        {"gradient_checkpointing": "none", "batch": 8, "fits": False, "peak_gib": None},
        {"gradient_checkpointing": "full", "batch": 1, "fits": True, "peak_gib": 4.0},
        {"gradient_checkpointing": "full", "batch": 2, "fits": True, "peak_gib": 5.0},
        {"gradient_checkpointing": "full", "batch": 9, "fits": False, "peak_gib": 12.0},
        {"gradient_checkpointing": "full", "batch": 8, "fits": True, "peak_gib": 11.0},
    ]
    metrics = {
        "extract": {"documents": 8, "kept": 7, "left_out": {"no_text_layer": 1},
                    "engine": {"pdfium": 7}, "language": {"de": 2, "en": 5}, "partial": 0,
                    "pages_read": 7, "characters_raw": 1100, "characters": 1000},
        "split": {split: {"documents": len(ids), "characters": 100, "words": 20} for split, ids in splits.items()}
        | {"test_13grams_in_train": 0.02},
        "tokenize": {split: {"documents": len(ids), "tokens": 100 * len(ids)} for split, ids in splits.items()},
        "convert": {"layout": "meta", "num_parameters": 4983552, "hidden_size": 256, "num_layers": 5,
                    "vocab_size": 4096, "dtype": "float32", "context_length": 131072},
        "batch": {"device": "NVIDIA T4", "budget_gib": 11.5, "kernels": "fused", "gradient_checkpointing": "full",
                  "largest_batch": 8, "per_device_batch": 4, "gradient_accumulation_steps": 2, "effective_batch": 8,
                  "modes": {"none": {"largest_batch": 1},
                            "full": {"largest_batch": 8, "fixed_gib": 3.0, "gib_per_sequence": 1.0}},
                  "probes": probes},
        "eval": evaluation(20.0, improvement) | {"documents": num_test, "tokens": 100 * num_test,
                 "interval": "jackknife", "general": evaluation(30.0, -0.02) | {"documents": 24, "tokens": 2400}},
        "train/metrics": {"step": 3},
    }  # fmt: skip
    curves = {"train/loss": 3.0, "train/perplexity": 20.0, "learning_rate": 1e-4, "gradient_norm": 0.5}
    if num_validation:
        curves |= {"validation/loss": 3.1, "validation/perplexity": 22.0}
    for name, value in curves.items():
        file = folder / f"metrics/train/plots/metrics/{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"step\t{file.stem}\n" + "".join(f"{step}\t{value / step}\n" for step in (1, 2, 3)))
    for name, value in metrics.items():
        (folder / f"metrics/{name}.json").write_text(json.dumps(value))
    header = "id,tokens,bytes,words,base_perplexity,adapted_perplexity,improvement"
    (folder / "metrics/eval_documents.csv").write_text(
        "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
    )
    tokens = [
        {"text": "Sea", "base_nats": 3.0, "adapted_nats": 1.0},
        {"text": " <i>", "base_nats": 1, "adapted_nats": 2},
    ]
    sample = {"document": names[0], "prompt": "Sea", "truth": " <i>", "base": " is <script>", "adapted": " rises"}
    (folder / "data/samples.json").write_text(json.dumps([sample | {"tokens": tokens}]))
    (folder / "dvc.lock").write_text(lock_of_the_data())
    return folder


def evaluation(base: float, improvement: float) -> dict[str, dict[str, float]]:
    """The models of metrics/eval.json; quantization costs 2%."""

    def interval(value: float) -> dict[str, float]:
        return {"low_95": value - 0.1, "high_95": value + 0.1}

    def model(perplexity: float) -> dict[str, float]:
        scores = {"perplexity": perplexity, "bits_per_byte": 1.0, "word_perplexity": 100.0}
        return scores | interval(perplexity)

    over_unquantized = 1 - 1.02 * (1 - improvement)
    return {
        "base_unquantized": model(base / 1.02),
        "base": model(base),
        "adapted": model(base * (1 - improvement)),
        "improvement": {"share": improvement, **interval(improvement)},
        "improvement_over_unquantized": {"share": over_unquantized, **interval(over_unquantized)},
        "quantization_cost": {"share": 0.02, **interval(0.02)},
    }


def write_machine(folder: Path) -> None:
    """metrics/machine.json and the curves of 20 seconds."""
    stages = {
        "train": {"seconds": 20.0, "tokens_per_s": 34567},
        "sample": {"seconds": 1.0},
    }
    (folder / "metrics/machine").mkdir()
    (folder / "metrics/machine.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA T4"}} | stages))
    rows = [f"{second}\t2.0\t11.0\t{90 + second % 2}\t300" for second in range(21)]
    header = "seconds\tprocess_memory_gib\tgpu_memory_gib\tgpu_utilization_percent\tgpu_power_w"
    (folder / "metrics/machine/train.tsv").write_text("\n".join([header, *rows]) + "\n")
