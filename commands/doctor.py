"""doctor: checks params.yaml, the corpus, the source model and this machine, and forecasts the run

It takes two seconds and changes nothing. If this machine may read 4-bit weights back wrongly, it also imports torch for
a check, which takes five seconds more. The exit status is 1 if the run would fail.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pdf2lora.documents.sources import Listing, list_corpus
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import Params, read_params
from pdf2lora.paths import CORPORA
from pdf2lora.preflight import environment
from pdf2lora.preflight.corpus import corpus
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.findings import Finding, has_problem
from pdf2lora.preflight.folders import require_folders
from pdf2lora.preflight.forecast import Estimate, forecast, required_disk_gib, schedule_notes, training_sequences
from pdf2lora.preflight.host_memory import host_memory
from pdf2lora.preflight.model_shape import ModelShape
from pdf2lora.preflight.placement import placement
from pdf2lora.preflight.previous_run import PreviousRun
from pdf2lora.preflight.source_model import source_model
from pdf2lora.preflight.token_count import count_training_tokens
from pdf2lora.runtime.arguments import require_no_arguments

REQUIREMENTS = Path("requirements.txt")


@report_input_errors
def main() -> None:
    params = read_params()
    require_folders(params)
    gpus = environment.find_gpus()
    folder = CORPORA / params.corpus
    machine = check_machine(params, gpus)
    model_findings, shape = source_model(params)
    try:
        listing = list_corpus(folder)
        corpus_findings = corpus(folder, listing)
    except InputError as error:
        listing, corpus_findings = Listing([], []), [Finding("problem", "corpus", str(error))]
    inputs = [*corpus_findings, *model_findings]
    findings = [Finding("ok", "params", "params.yaml is valid"), *machine, *inputs]
    estimates: list[Estimate] = []

    if shape is not None and not has_problem(inputs):
        previous = PreviousRun.read(params)
        tokens = count_training_tokens(params, previous, folder, listing.sources)
        if tokens.num_tokens == 0:
            text = f"pdfium can read no page of {folder}. Put PDFs there that are whole and open without a password."
            findings.append(Finding("problem", "corpus", text))
        estimates = forecast(params, previous, shape, gpus, tokens)
        findings += schedule_notes(previous, params, training_sequences(params, tokens))
        findings += check_capacity(params, previous, shape, gpus)
        if not has_problem(machine):
            findings += environment.four_bit_weights(params, shape, has_gpu=bool(gpus))

    print_report(findings, estimates)
    if has_problem(findings):
        sys.exit(1)


def check_machine(params: Params, gpus: list[Gpu]) -> list[Finding]:
    return [
        environment.python_version(),
        environment.packages(REQUIREMENTS),
        environment.git(),
        environment.gpu(gpus, params.compute.num_processes),
        environment.torch_build(gpus),
        environment.bitsandbytes(params.quantization.bits, gpus),
        environment.flash_attention(params.compute.attention, gpus),
    ]


def check_capacity(params: Params, previous: PreviousRun, shape: ModelShape, gpus: Sequence[Gpu]) -> list[Finding]:
    """Free memory and disk space for this model."""
    packed_gib = shape.layers_gib(params.quantization) if gpus and params.quantization.bits == 4 else 0.0
    findings = [
        host_memory(params, shape, gpus),
        environment.disk(Path(), required_disk_gib(previous, shape) + packed_gib),
    ]
    if gpus and (finding := placement(params, shape, gpus)):
        findings.append(finding)
    return findings


def print_report(findings: Sequence[Finding], estimates: Sequence[Estimate]) -> None:
    for finding in findings:
        print(f"{finding.level:<8} {finding.subject:<13} {finding.text}")
    if estimates:
        print("\nforecast of this run")
    for estimate in estimates:
        print(f"  {estimate.quantity:<10} {estimate.value}\n  {'':<10} {estimate.source}: {estimate.explanation}")


if __name__ == "__main__":
    require_no_arguments(__doc__)
    main()
