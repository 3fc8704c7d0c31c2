"""tokenize: data/split, data/replay, the tokenizer of models/base -> data/tokens/, metrics/tokenize.json

The later stages read the tokens from memory-mapped files. compute.seq_length does not matter here: sequences and
windows are views of these files.
"""

import time
from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import SPLITS as NAMES
from pdf2lora.documents.records import read_documents
from pdf2lora.documents.replay import read_replay, require_unseen
from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.general import read_general
from pdf2lora.params import read_params
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.parallel import Workers
from pdf2lora.runtime.processes import single_instance
from pdf2lora.runtime.scratch import fingerprint, scratch_folder
from pdf2lora.token_files import write_tokens
from pdf2lora.tokens import Encoder

BASE = Path("models/base")
SPLITS = Path("data/split")
REPLAY = Path("data/replay")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokenize.json")


@report_input_errors
@single_instance
def main() -> None:
    began = time.monotonic()
    replay = read_params().train.replay
    require_inputs_of("tokenize")
    encoder = Encoder.load(BASE)
    counts = {}
    with atomic_directory(TOKENS) as folder:
        for name in NAMES:
            documents = read_documents(SPLITS / f"{name}.jsonl")
            progress = tqdm(documents, desc=f"tokenize {name}", unit="document", disable=None)
            counts[name] = write_tokens(folder, name, (document.text for document in progress), encoder)
        if replay != "none":
            require_unseen_replay(REPLAY / replay)
        texts = read_replay(REPLAY / replay) if replay != "none" else []
        replay_counts = write_tokens(folder, "replay", texts, encoder)
    if replay != "none":
        counts["replay"] = replay_counts
    write_json(METRICS, counts)
    numbers = ", ".join(f"{count['tokens']:,} {name}" for name, count in counts.items())
    print(f"tokenize: {numbers} tokens, {time.monotonic() - began:.1f} s")


def require_unseen_replay(folder: Path) -> None:
    """Refuses replay text that evaluate scores."""
    tests = (document.text for document in read_documents(SPLITS / "test.jsonl"))
    scratch = scratch_folder("tokenize", fingerprint(folder.name))
    with Workers() as workers:
        require_unseen(read_replay(folder), read_general(), "the general text (data/general)", scratch, workers)
        require_unseen(read_replay(folder), tests, "the test documents", scratch, workers)


if __name__ == "__main__":
    main()
