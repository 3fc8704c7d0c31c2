"""split: data/documents.jsonl -> data/split/{train,validation,test}.jsonl, metrics/split.json"""

from pathlib import Path

from pdf2lora.documents.leakage import leakage
from pdf2lora.documents.records import Document, read_documents, write_documents
from pdf2lora.documents.splitting import split
from pdf2lora.documents.text import words
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import read_params
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.processes import single_instance

DOCUMENTS = Path("data/documents.jsonl")
SIDES = Path("data/split")
METRICS = Path("metrics/split.json")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params().split
    kept = [document for document in read_documents(DOCUMENTS) if document.reason is None]

    try:
        sides = split(
            kept,
            test_fraction=params.test_fraction,
            validation_fraction=params.validation_fraction,
            similarity=params.near_duplicate_similarity,
            seed=params.seed,
        )
    except ValueError as error:
        raise InputError(
            f"{DOCUMENTS}: {len(kept)} documents kept, too few to split ({error}); add PDFs"
            + (" or set split.validation_fraction to 0" if params.validation_fraction and len(kept) > 1 else "")
        ) from None
    metrics: dict[str, object] = {side: counts(documents) for side, documents in sides.items()}
    metrics["test_13grams_in_train"] = leakage(*[[d.text for d in sides[side]] for side in ("train", "test")])

    with atomic_directory(SIDES) as folder:
        for side, documents in sides.items():
            write_documents(folder / f"{side}.jsonl", documents)
    write_json(METRICS, metrics)
    print("split: " + ", ".join(f"{len(documents)} {side}" for side, documents in sides.items()) + " documents")


def counts(documents: list[Document]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "characters": sum(document.characters for document in documents),
        "words": sum(len(words(document.text)) for document in documents),
    }


if __name__ == "__main__":
    main()
