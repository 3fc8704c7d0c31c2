"""check: params.yaml -> data/checked

Runs before the first stage whenever params.yaml has changed: what is wrong with it is said in the first second, not by
the first stage that imports torch, and not by DVC, which would find a missing folder itself, name it and nothing else,
and have deleted the stage's old outputs by then. The output never changes, so that no stage runs again because of it.
"""

from pathlib import Path

from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.revisions import read_documents_at, resolve_commit
from pdf2lora.params import read_params
from pdf2lora.preflight.folders import CORPORA, SOURCES, require_folder
from pdf2lora.runtime.files import atomic_write
from pdf2lora.runtime.processes import single_instance
from pdf2lora.runtime.scratch import project_root

CHECKED = Path("data/checked")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()

    require_folder("corpus", CORPORA / params.corpus, "put your PDFs there")
    require_folder("model", SOURCES / params.model, "put the checkpoint there")

    if params.evaluate.compare_to != "none":
        read_documents_at(resolve_commit(params.evaluate.compare_to, project_root()), project_root())

    with atomic_write(CHECKED) as partial:
        partial.write_text("params.yaml is valid, and the folders that it names are there\n")
    print(f"check: params.yaml is valid; corpus {params.corpus}, model {params.model}")


if __name__ == "__main__":
    main()
