"""The stage evaluate in one of its processes: scores test documents and general text, writes metrics and samples."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import read_documents
from pdf2lora.evaluation.base_scores import BaseScores, base_scores_file
from pdf2lora.evaluation.comparison import compare, comparison_line, comparison_metrics, parse_table, require_pairs
from pdf2lora.evaluation.general import GENERAL, read_general
from pdf2lora.evaluation.metrics import (
    ScoredText,
    Scores,
    document_table,
    evaluation_metrics,
    scored_text,
    summary_lines,
)
from pdf2lora.evaluation.revisions import read_documents_at, resolve_commit
from pdf2lora.evaluation.samples import continue_openings, read_openings, sample_entries
from pdf2lora.evaluation.scored_documents import TEST, read_test
from pdf2lora.evaluation.scoring import Nats, nats_per_document
from pdf2lora.evaluation.unquantized import build_unquantized
from pdf2lora.model.forward import Forward, build_forward
from pdf2lora.model.initialization import restore_trained_base
from pdf2lora.model.kernel_choice import choose_exact_kernels
from pdf2lora.model.loading import load_adapter, load_base, read_config
from pdf2lora.params import Params
from pdf2lora.paths import ADAPTER, BASE, EVAL_DOCUMENTS
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.files import atomic_write, write_json
from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.scratch import project_root
from pdf2lora.tokens import Encoder, require_context, windows

METRICS = Path("metrics/eval.json")
SAMPLES = Path("data/samples.json")


def run(params: Params, require_base: Callable[[], None] | None) -> None:
    """Scores with all processes of the job; the main one writes the results.

    require_base: waits for the check of the base model's files (manifest.start_check); None in the other processes.

    Raises InputError if the base model, the baseline or a setting cannot be used.
    """
    processes = Processes()
    processes.leave_output_to_main()
    settings, samples = params.evaluate, params.sample
    if require_base:
        require_base()
    baseline = None
    if settings.compare_to != "none":
        commit = resolve_commit(settings.compare_to, project_root())
        baseline = parse_table(read_documents_at(commit, project_root()))
    seq_length = params.compute.seq_length
    require_context(BASE, {"compute.seq_length": seq_length})
    require_context(BASE, samples.num_tokens)
    encoder, general_texts = Encoder.load(BASE), read_general()
    ids, encoded = [], []
    test: list[ScoredText] = []
    for document, tokens, group in read_test():
        ids.append(document.id)
        test.append(scored_text(document.text, tokens, group))
        encoded.append(tokens)
    general_tokens = encoder.encode(general_texts)
    general = list(map(scored_text, general_texts, general_tokens, count()))
    encoded += general_tokens
    all_windows = windows(encoded, bos=encoder.start, seq_length=seq_length, stride=settings.stride)
    first_documents = list(islice(read_documents(TEST), samples.num_documents))
    openings = read_openings(first_documents, encoder, samples)
    scores_unquantized = settings.unquantized_base and params.quantization.bits < 16
    kernels = choose_exact_kernels(params.compute, params.quantization, params.lora, read_config(BASE))
    base_file = base_scores_file(params, kernels, BASE / MANIFEST, TEST, GENERAL)
    base_is_known = processes.broadcast(base_file.exists())
    if base_is_known and processes.is_main:
        print("evaluate: an earlier run has scored the base model")
    num_windows = len(all_windows) * (1 if base_is_known else 3 if scores_unquantized else 2)

    with (
        machine_metrics("evaluate") if processes.is_main else nullcontext(),
        tqdm(total=num_windows, desc="evaluate", unit="window", disable=None if processes.is_main else True) as bar,
    ):

        def score(forward: Forward) -> Nats:
            return nats_per_document(
                forward,
                all_windows,
                num_documents=len(encoded),
                per_device_batch=settings.per_device_batch,
                processes=processes,
                progress=lambda num_windows: bar.update(num_windows * processes.count),
            )

        unquantized_nats = None
        if scores_unquantized and not base_is_known:
            unquantized = build_unquantized(BASE, params.quantization, params.compute, kernels)
            unquantized_nats = score(unquantized)
            del unquantized  # frees its memory before the quantized model is loaded
        model = load_adapter(load_base(BASE, params.quantization, params.compute, processes=processes), ADAPTER)
        if not base_is_known:
            forward = build_forward(model, kernels)
            with model.disable_adapter():
                base_nats = score(forward)
                if processes.is_main:
                    base_texts = continue_openings(forward, openings, encoder, samples)
                    BaseScores(base_nats, unquantized_nats, base_texts).write(base_file)
        restore_trained_base(model, BASE, ADAPTER, params.lora)
        forward = build_forward(model, kernels)
        adapted_nats = score(forward)
        processes.end()
        if not processes.is_main:
            return
        adapted_texts = continue_openings(forward, openings, encoder, samples)

    base = BaseScores.read(base_file)
    scores = Scores(base.nats, adapted_nats, base.unquantized_nats)
    test_scores, general_scores = scores.part(slice(len(test))), scores.part(slice(len(test), None))
    table = document_table(ids, test, test_scores)
    metrics = evaluation_metrics(test_scores, test, general_scores, general)
    lines = summary_lines(metrics, params.quantization.bits)
    if baseline is not None:
        comparison = require_pairs(compare(table, baseline))
        metrics["comparison"] = comparison_metrics(settings.compare_to, commit, comparison)
        lines.append(comparison_line(settings.compare_to, commit, comparison))

    write_json(METRICS, metrics)
    write_json(SAMPLES, sample_entries(openings, base.texts, adapted_texts))
    with atomic_write(EVAL_DOCUMENTS) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
    print(*(f"evaluate: {line}" for line in lines), sep="\n")
