"""report: metrics, data/documents.jsonl, data/split, data/samples.json, dvc.lock -> reports/

index.html, figures and model_card.md are outputs: the same results give the same bytes, and `dvc exp apply` restores
them. machine.html has the numbers of this machine, which differ from run to run, so it is not an output.
"""

from pathlib import Path

from pdf2lora.params import read_params
from pdf2lora.paths import ADAPTER, BASE, CORPORA, DOCUMENTS, SOURCE_MODELS, SPLIT_DOCUMENTS, TOKENS
from pdf2lora.report.card import render_card
from pdf2lora.report.machine import read_measurements, render_machine
from pdf2lora.report.page import render_page, result_figures
from pdf2lora.report.results import read_results
from pdf2lora.report.style import save
from pdf2lora.runtime.files import atomic_directory, atomic_write
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.processes import stage_main

REPORTS = Path("reports")


@stage_main
def main() -> None:
    params = read_params()
    require_inputs_of("report")
    source = SOURCE_MODELS / params.model
    hashed = [DOCUMENTS, SPLIT_DOCUMENTS, TOKENS, BASE, ADAPTER, Path("metrics/eval.json")]
    results = read_results(source, [CORPORA / params.corpus, source, *hashed])
    figures = result_figures(results)

    with atomic_directory(REPORTS / "figures") as folder:
        svgs = {name: save(figure, folder, name) for name, figure in figures.items()}
    pages = {
        "index.html": render_page(results, params, svgs),
        "model_card.md": render_card(results, params),
        "machine.html": render_machine(read_measurements(), params),
    }
    for name, text in pages.items():
        with atomic_write(REPORTS / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(f"report: {REPORTS / 'index.html'}, {len(figures)} figures in {REPORTS / 'figures'}")


if __name__ == "__main__":
    main()
