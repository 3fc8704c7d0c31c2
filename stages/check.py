"""check: params.yaml -> data/checked

Runs before the first stage whenever params.yaml has changed: what is wrong with it is said in the first second, not by
the first stage that imports torch, and not by DVC, which would find a missing folder itself, name it and nothing else,
and have deleted the stage's old outputs by then. The output never changes, so that no stage runs again because of it.
"""

from pathlib import Path

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.orphans import after_orphans
from pdf2lora.params import read_params
from pdf2lora.runtime import whole_file

CORPORA = Path("data/pdfs")
CHECKPOINTS = Path("models/meta")
CHECKED = Path("data/checked")


@report_input_errors
@after_orphans
def main() -> None:
    params = read_params()

    require_folder("corpus", CORPORA / params.corpus, "put your PDFs there")
    require_folder("model", CHECKPOINTS / params.model, "put the checkpoint there")

    with whole_file(CHECKED) as partial:
        partial.write_text("params.yaml is valid, and the folders that it names are there\n")
    print(f"check: params.yaml is valid; corpus {params.corpus}, model {params.model}")


def require_folder(key: str, folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in folder.parent.glob("*/"))) or "none"
        raise InputError(
            f"{key}: '{folder.name}' must be a folder of {folder.parent} (there: {known}); "
            f"{remedy}, or choose another with -S {key}=..."
        )


if __name__ == "__main__":
    main()
