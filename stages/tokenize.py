"""tokenize: data/split, the tokenizer of models/base -> data/tokens/, metrics/tokenize.json

The later stages read the tokens from memory-mapped files. compute.seq_length does not matter here: sequences and
windows are views of these files.
"""

import time
from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import SPLITS as NAMES
from pdf2lora.documents.records import read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.processes import single_instance
from pdf2lora.token_files import write_tokens
from pdf2lora.tokens import Encoder

BASE = Path("models/base")
SPLITS = Path("data/split")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokenize.json")


@report_input_errors
@single_instance
def main() -> None:
    began = time.monotonic()
    require_inputs_of("tokenize")
    encoder = Encoder.load(BASE)
    counts = {}
    with atomic_directory(TOKENS) as folder:
        for name in NAMES:
            documents = read_documents(SPLITS / f"{name}.jsonl")
            progress = tqdm(documents, desc=f"tokenize {name}", unit="document", disable=None)
            counts[name] = write_tokens(folder, name, (document.text for document in progress), encoder)
    write_json(METRICS, counts)
    numbers = ", ".join(f"{count['tokens']:,} {name}" for name, count in counts.items())
    print(f"tokenize: {numbers} tokens, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
