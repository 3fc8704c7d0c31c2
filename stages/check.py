"""check: params.yaml -> data/checked

Runs before the other stages after each change of params.yaml. It reports invalid settings, missing folders, a corpus
without PDFs, damaged archives and an unusable source model within two seconds, before a later stage imports torch, and
before DVC deletes old outputs. Its output never changes. So no other stage runs again because of it.
"""

from pathlib import Path

from pdf2lora.documents.sources import list_corpus, require_sources
from pdf2lora.evaluation.revisions import read_documents_at, resolve_commit
from pdf2lora.params import read_params
from pdf2lora.paths import CORPORA
from pdf2lora.preflight.folders import require_folders
from pdf2lora.preflight.source_model import inspect_for
from pdf2lora.runtime.files import atomic_write
from pdf2lora.runtime.processes import stage_main
from pdf2lora.runtime.scratch import project_root

CHECKED = Path("data/checked")


@stage_main
def main() -> None:
    params = read_params()
    require_folders(params)
    require_sources(CORPORA / params.corpus, list_corpus(CORPORA / params.corpus))
    inspect_for(params)

    if params.evaluate.compare_to != "none":
        read_documents_at(resolve_commit(params.evaluate.compare_to, project_root()), project_root())

    with atomic_write(CHECKED) as partial:
        partial.write_text("params.yaml is valid, and the folders that it names are there\n")
    print(f"check: params.yaml is valid; corpus {params.corpus}, model {params.model}")


if __name__ == "__main__":
    main()
