"""convert: models/meta/<model>/ -> models/base/, metrics/convert.json

models/base is in Hugging Face's layout whichever of the two the checkpoint came in, with a manifest of its files.
"""

from pathlib import Path

from tqdm import tqdm

from pdf2lora.errors import report_input_errors
from pdf2lora.llama import convert
from pdf2lora.manifest import write_manifest
from pdf2lora.orphans import after_orphans
from pdf2lora.params import read_params
from pdf2lora.runtime import whole_folder, write_json

CHECKPOINTS = Path("models/meta")
BASE = Path("models/base")
METRICS = Path("metrics/convert.json")


@report_input_errors
@after_orphans
def main() -> None:
    params = read_params()
    source = CHECKPOINTS / params.model

    with (
        whole_folder(BASE) as folder,
        tqdm(desc="convert", unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = convert(
            source,
            folder,
            llama_version=params.checkpoint.llama_version,
            max_shard_gib=params.convert.max_shard_gib,
            progress=progress,
        )
        write_manifest(folder)

    write_json(METRICS, summary)
    print(f"convert: {source} -> {BASE}, {summary['num_parameters']:,} parameters")


if __name__ == "__main__":
    main()
