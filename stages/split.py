"""split: data/documents.jsonl -> data/split/{train,validation,test}.jsonl, metrics/split.json"""

from pathlib import Path

from pdf2lora.documents.records import read_documents, write_documents
from pdf2lora.documents.splitting import split, summarize
from pdf2lora.errors import report_input_errors
from pdf2lora.params import read_params
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.processes import single_instance

DOCUMENTS = Path("data/documents.jsonl")
SPLITS = Path("data/split")
METRICS = Path("metrics/split.json")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params().split
    usable = [document for document in read_documents(DOCUMENTS) if document.reason is None]
    splits = split(
        usable,
        test_fraction=params.test_fraction,
        validation_fraction=params.validation_fraction,
        similarity=params.near_duplicate_similarity,
        seed=params.seed,
    )
    with atomic_directory(SPLITS) as folder:
        for name, documents in splits.items():
            write_documents(folder / f"{name}.jsonl", documents)
    write_json(METRICS, summarize(splits))
    print("split: " + ", ".join(f"{len(documents)} {name}" for name, documents in splits.items()) + " documents")


if __name__ == "__main__":
    main()
