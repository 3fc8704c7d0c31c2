"""check: params.yaml -> data/checked

Runs before the other stages whenever params.yaml has changed. It reports invalid settings and missing folders within
a second, before a later stage imports torch, and before DVC deletes the old outputs of a stage. The output never
changes, so this stage re-runs no other one.
"""

from pathlib import Path

from pdf2lora.errors import report_input_errors
from pdf2lora.params import read_params
from pdf2lora.preflight.folders import require_folders
from pdf2lora.runtime.files import atomic_write
from pdf2lora.runtime.processes import single_instance

CHECKED = Path("data/checked")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    require_folders(params)

    with atomic_write(CHECKED) as partial:
        partial.write_text("params.yaml is valid, and the folders that it names are there\n")
    print(f"check: params.yaml is valid; corpus {params.corpus}, model {params.model}")


if __name__ == "__main__":
    main()
