"""convert: models/source/<model>/ -> models/base/, metrics/convert.json

models/base is in Hugging Face's layout and has a manifest of its files.
"""

from pathlib import Path

from tqdm import tqdm

from pdf2lora.params import read_params
from pdf2lora.paths import BASE, SOURCE_MODELS
from pdf2lora.runtime.files import atomic_directory, write_json
from pdf2lora.runtime.manifest import write_manifest
from pdf2lora.runtime.processes import stage_main
from pdf2lora.weights.conversion import convert

METRICS = Path("metrics/convert.json")


@stage_main
def main() -> None:
    params = read_params()
    source = SOURCE_MODELS / params.model

    with (
        atomic_directory(BASE) as folder,
        tqdm(desc="convert", unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = convert(
            source,
            folder,
            llama_version=params.llama_version,
            max_shard_gib=params.convert.max_shard_gib,
            progress=progress,
        )
        write_manifest(folder)

    write_json(METRICS, summary)
    print(f"convert: {source} -> {BASE}, {summary['num_parameters']:,} parameters")


if __name__ == "__main__":
    main()
