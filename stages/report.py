"""report: metrics/*, data/documents.jsonl, data/split, data/samples.json, dvc.lock -> reports/

reports/index.html, reports/figures and reports/model_card.md are outputs: the same bytes from the same results, so that
DVC keeps them with each experiment and `dvc exp apply` brings back the page of that experiment. reports/machine.js and
reports/machine hold what this machine measured; no two runs share that, so they are nobody's output, as
metrics/machine.json is not, and dvc.lock stays as it is when a run is repeated.
"""

from pathlib import Path

from pdf2lora.errors import report_input_errors
from pdf2lora.params import read_params
from pdf2lora.report.card import render_card
from pdf2lora.report.page import machine_figures, read_machine, render_machine, render_page, result_figures, with_energy
from pdf2lora.report.results import read_results
from pdf2lora.report.style import save
from pdf2lora.runtime.files import atomic_directory, atomic_write
from pdf2lora.runtime.processes import single_instance
from pdf2lora.runtime.scratch import fingerprint

REPORTS = Path("reports")
MACHINE = Path("metrics/machine.json")
MACHINE_CURVES = Path("metrics/machine")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    hashed = ["data/documents.jsonl", "data/split", "models/base", "models/adapter", "metrics/eval.json"]
    checkpoint = Path("models/source") / params.model
    results = read_results(checkpoint, [f"data/pdfs/{params.corpus}", str(checkpoint), *hashed])
    machine, curves = read_machine(MACHINE, MACHINE_CURVES)

    run = fingerprint(params, results)
    drawn, drawn_of_machine = result_figures(results), machine_figures(curves)

    REPORTS.mkdir(exist_ok=True)
    with atomic_directory(REPORTS / "figures") as folder:
        svgs = {name: save(figure, folder, name) for name, figure in drawn.items()}
    with atomic_directory(REPORTS / "machine") as folder:
        svgs_of_machine = {name: save(figure, folder, name) for name, figure in drawn_of_machine.items()}
    texts = {
        "index.html": render_page(results, params, svgs, run),
        "model_card.md": render_card(results, params),
        "machine.js": render_machine(with_energy(machine, curves), svgs_of_machine, run),
    }
    for name, text in texts.items():
        with atomic_write(REPORTS / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(f"report: {REPORTS / 'index.html'}, {len(drawn)} figures in {REPORTS / 'figures'}")


if __name__ == "__main__":
    main()
