"""Compares the selected text of each PDF with PyPDF2's text.

    python -m benchmarks.text_quality <folder of PDFs> <folder of prose .txt.gz> <causal language model> <results.json>

Both texts have the settings of params.yaml; "before" has `extract.engines: [pypdf2]` and no OCR. Unknown words: the
share of words of two or more Latin letters that occur less than three times in the prose. Bits per character: negative
log2 likelihood of the first tokens (one window) per character other than spaces. Lower is better in both.
"""

import argparse
import gzip
import json
import math
import re
import statistics
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdf2lora.documents.corpus import extract_corpus
from pdf2lora.documents.extraction import extract
from pdf2lora.documents.records import Document
from pdf2lora.documents.sources import list_corpus
from pdf2lora.params import Extract, read_params
from pdf2lora.runtime.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pdfs", type=Path)
    parser.add_argument("prose", type=Path)
    parser.add_argument("model")
    parser.add_argument("results", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    arguments = parser.parse_args()

    settings = read_params().extract
    after = read_documents(arguments.pdfs, settings)
    before = read_documents(arguments.pdfs, settings.model_copy(update={"engines": ["pypdf2"], "ocr": "none"}))
    known = known_words(arguments.prose)
    model = load_model(arguments.model)
    rows = []
    for name in after:
        row: dict[str, Any] = {"id": name, "engine": after[name].engine, "reason": after[name].reason}
        for label, document in (("before", before[name]), ("after", after[name])):
            row[label] = None
            if document.reason is None:
                row[label] = {
                    "characters": document.characters,
                    "unknown_words": round(unknown_words(document.text, known), 4),
                    "bits_per_character": round(bits_per_character(document.text, arguments.tokens, *model), 3),
                }
        rows.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
    results = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "model": Path(arguments.model).name,
        "tokens": arguments.tokens,
        "summary": summarize(rows),
    }
    write_json(arguments.results, results | {"documents": rows})
    print(json.dumps(results["summary"], indent=2))


def read_documents(folder: Path, settings: Extract) -> dict[str, Document]:
    with tempfile.TemporaryDirectory() as cache:
        documents = extract_corpus(folder, list_corpus(folder).sources, Path(cache), settings, extract)
        return {document.id: document for document in documents}


def known_words(folder: Path) -> frozenset[str]:
    counts = Counter[str]()
    for file in folder.glob("*.txt.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as text:
            counts.update(re.findall("[a-z]+", text.read().lower()))
    return frozenset(word for word, count in counts.items() if count >= 3)


def unknown_words(text: str, known: frozenset[str]) -> float:
    words = [word.lower() for word in re.findall("[A-Za-z]{2,}", text)]
    return sum(word not in known for word in words) / max(1, len(words))


def load_model(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def bits_per_character(text: str, num_tokens: int, tokenizer: Any, model: Any) -> float:
    import torch

    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        logits = model(torch.tensor([[start, *ids]])).logits[0, :-1]
        nats = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
    return nats / math.log(2) / max(1, len("".join(tokenizer.decode(ids).split())))


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    both = [row for row in rows if row["before"] and row["after"]]
    share = [row["after"]["bits_per_character"] / row["before"]["bits_per_character"] - 1 for row in both]
    return {
        "documents": len(rows),
        "kept_before": sum(row["before"] is not None for row in rows),
        "kept_after": sum(row["after"] is not None for row in rows),
        "engine": dict(Counter(str(row["engine"]) for row in rows if row["after"])),
        "unknown_words_before": round(statistics.mean(row["before"]["unknown_words"] for row in both), 4),
        "unknown_words_after": round(statistics.mean(row["after"]["unknown_words"] for row in both), 4),
        "bits_per_character_change": {
            "median": round(statistics.median(share), 4),
            "best": round(min(share), 4),
            "worst": round(max(share), 4),
            "documents_with_fewer_bits": sum(change < 0 for change in share),
        },
    }


if __name__ == "__main__":
    main()
