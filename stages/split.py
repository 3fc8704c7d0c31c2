"""split: data/documents.jsonl -> data/split/{train,validation,test}.jsonl, metrics/split.json

data/split/test_groups.json has the number of the group of near-duplicates of each test document. evaluate needs it for
its intervals.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pdf2lora.cluster.tasks import map_on_cluster
from pdf2lora.documents.records import copy_documents, read_documents, read_with_offsets
from pdf2lora.params import read_params
from pdf2lora.paths import DOCUMENTS, SPLIT_DOCUMENTS, TEST_GROUPS
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.parallel import Workers
from pdf2lora.runtime.processes import stage_main
from pdf2lora.runtime.scratch import fingerprint, scratch_folder, stage_code
from pdf2lora.split.leakage import leakage
from pdf2lora.split.near_duplicates import near_duplicate_groups
from pdf2lora.split.sketches import SketchBatches, sketch_texts
from pdf2lora.split.splitting import group_numbers, split

METRICS = Path("metrics/split.json")
MIN_TRAIN_SHARE = 0.5  # of the characters that train should have; below, a warning is printed


@stage_main
def main() -> None:
    began = time.monotonic()
    params = read_params()
    require_inputs_of("split")
    scratch = scratch_folder("split", fingerprint(*stage_code("split")))
    offsets: list[int] = []
    num_characters: list[int] = []

    def usable_texts() -> Iterator[str]:
        documents = tqdm(read_with_offsets(DOCUMENTS), desc="split", unit="document", disable=None)
        for offset, document in documents:
            if document.reason is None:
                offsets.append(offset)
                num_characters.append(document.characters)
                yield document.text

    with Workers() as workers:
        run: SketchBatches = workers.map
        if params.cluster.scheduler != "local":
            run = partial(map_on_cluster, params.cluster.scheduler, "split", ("numpy",))
        sketches, num_new = sketch_texts(usable_texts(), scratch / "sketches.npy", run)
        groups = near_duplicate_groups(sketches["sketch"], params.split.near_duplicate_similarity)
        splits = split(
            [sha256.decode() for sha256 in sketches["text_sha256"].tolist()],
            groups,
            test_fraction=params.split.test_fraction,
            validation_fraction=params.split.validation_fraction,
            seed=params.split.seed,
        )
        metrics: dict[str, object] = {
            name: {
                "documents": len(numbers),
                "characters": sum(num_characters[number] for number in numbers),
                "words": int(sketches["num_words"][numbers].sum()),
            }
            for name, numbers in splits.items()
        }
        with atomic_directory(SPLIT_DOCUMENTS) as folder:
            for name, numbers in splits.items():
                copy_documents(DOCUMENTS, [offsets[number] for number in numbers], folder / f"{name}.jsonl")
            write_json(folder / TEST_GROUPS.name, group_numbers(splits["test"], groups))
            train, test = (
                (document.text for document in read_documents(folder / f"{name}.jsonl")) for name in ("train", "test")
            )
            metrics["test_13grams_in_train"] = leakage(train, test, scratch, workers)
    write_json(METRICS, metrics)
    train_share = sum(num_characters[number] for number in splits["train"]) / sum(num_characters)
    if train_share < MIN_TRAIN_SHARE * (1 - params.split.test_fraction - params.split.validation_fraction):
        print(
            f"split: warning: train has only {train_share:.0%} of the characters, because the other splits have very "
            "long documents. Change split.seed."
        )
    counts = ", ".join(f"{len(numbers):,} {name}" for name, numbers in splits.items())
    print(f"split: {counts} documents; {num_new:,} new texts compared, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
