"""tokenize: data/split, data/replay, the tokenizer of models/base -> data/tokens/, metrics/tokenize.json

The later stages read the tokens from memory-mapped files. The files do not depend on compute.seq_length, because
sequences and windows are views of them.
"""

import time
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from pdf2lora.cluster.tasks import map_on_cluster
from pdf2lora.documents.records import SPLITS, read_documents
from pdf2lora.evaluation.general import read_general
from pdf2lora.params import read_params
from pdf2lora.paths import BASE, REPLAY, SPLIT_DOCUMENTS, TOKENS
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.parallel import Workers
from pdf2lora.runtime.processes import stage_main
from pdf2lora.runtime.scratch import fingerprint, scratch_folder, stage_code
from pdf2lora.split.replay import read_replay, require_unseen
from pdf2lora.token_cache import TokenCache
from pdf2lora.token_files import EncodeBatches, encode_texts, write_tokens
from pdf2lora.tokens import Encoder

METRICS = Path("metrics/tokenize.json")
PACKAGES = ("tokenizers",)  # another version can give other tokens


@stage_main
def main() -> None:
    began = time.monotonic()
    params = read_params()
    replay = params.train.replay
    require_inputs_of("tokenize")
    encoder = Encoder.load(BASE)
    run: EncodeBatches = map  # the tokenizer uses all cores by itself
    if params.cluster.scheduler != "local":
        run = partial(map_on_cluster, params.cluster.scheduler, "tokenize", PACKAGES)
    key = fingerprint(BASE / "tokenizer.json", *stage_code("tokenize"), *map(version, PACKAGES))
    cache = TokenCache(scratch_folder("tokenize", "last_run"), key)

    def write(folder: Path, name: str, texts: Iterable[str]) -> dict[str, int]:
        documents = cache.encode(name, texts, lambda new: encode_texts(encoder, new, run))
        return write_tokens(folder, name, documents, encoder)

    counts = {}
    with atomic_directory(TOKENS) as folder:
        for name in SPLITS:
            documents = read_documents(SPLIT_DOCUMENTS / f"{name}.jsonl")
            progress = tqdm(documents, desc=f"tokenize {name}", unit="document", disable=None)
            counts[name] = write(folder, name, (document.text for document in progress))
        if replay == "none":
            write(folder, "replay", [])
        else:
            require_unseen_replay(REPLAY / replay)
            counts["replay"] = write(folder, "replay", read_replay(REPLAY / replay))
    cache.replace(TOKENS)
    write_json(METRICS, counts)
    numbers = ", ".join(f"{count['tokens']:,} {name}" for name, count in counts.items())
    print(f"tokenize: {numbers} tokens; {cache.num_new:,} new texts, {time.monotonic() - began:.1f} s")


def require_unseen_replay(folder: Path) -> None:
    """Refuses replay text that evaluate scores."""
    tests = (document.text for document in read_documents(SPLIT_DOCUMENTS / "test.jsonl"))
    scratch = scratch_folder("tokenize", fingerprint(folder.name))
    with Workers() as workers:
        require_unseen(read_replay(folder), read_general(), "the general text (data/general)", scratch, workers)
        require_unseen(read_replay(folder), tests, "the test documents", scratch, workers)


if __name__ == "__main__":
    main()
