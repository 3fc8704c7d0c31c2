"""Compares our perplexity with that of EleutherAI's lm-evaluation-harness on the test documents.

    pip install lm-eval==0.4.13        (thirty packages: use a separate environment)

Scores the base and the adapted model with windows without overlap (the rolling log-likelihood of the harness) and with
windows of evaluate.stride (the harness's windows with more context). The exit status is 1 if the perplexities differ by
more than 1e-4.
"""

import math
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from pdf2lora.documents.records import read_documents
from pdf2lora.evaluation.scoring import nats_per_document
from pdf2lora.model.forward import build_forward
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import read_params
from pdf2lora.paths import ADAPTER, BASE, SPLIT_DOCUMENTS
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import Encoder, windows

TOLERANCE = 1e-4


def main() -> None:
    params = read_params()
    encoder, texts = Encoder.load(BASE), [document.text for document in read_documents(SPLIT_DOCUMENTS / "test.jsonl")]
    encoded = encoder.encode(texts)
    num_tokens = sum(map(len, encoded))
    model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)
    harness = HFLM(
        pretrained=model.get_base_model(),
        tokenizer=AutoTokenizer.from_pretrained(BASE),
        max_length=params.compute.seq_length,
        batch_size=params.evaluate.per_device_batch,
        add_bos_token=False,  # bos is the prefix of the first token; by default the harness also scores it
    )
    largest = 0.0

    def check(name: str, stride: int) -> None:
        nonlocal largest
        ours = nats_per_document(
            build_forward(model, "reference"),
            windows(encoded, bos=encoder.start, seq_length=params.compute.seq_length, stride=stride),
            num_documents=len(texts),
            per_device_batch=params.evaluate.per_device_batch,
            processes=Processes.alone(model.device),
        ).sum()
        theirs = rolling_nats(harness, texts, stride)
        perplexities = math.exp(ours / num_tokens), math.exp(theirs / num_tokens)
        difference = abs(perplexities[0] / perplexities[1] - 1)
        largest = max(largest, difference)
        print(
            f"{name}, stride {stride}: ours {perplexities[0]:.6f}, harness {perplexities[1]:.6f}, "
            f"relative difference {difference:.1e}"
        )

    for stride in (params.compute.seq_length, params.evaluate.stride):
        check("adapted", stride)
        with model.disable_adapter():
            check("base", stride)
    sys.exit(largest > TOLERANCE)


def rolling_nats(harness: HFLM, texts: list[str], stride: int) -> float:
    if stride == harness.max_length:
        requests = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
            for number, text in enumerate(texts)
        ]
        return -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    requests = [
        (None, *make_disjoint_window(window))
        for text in texts
        for window in get_rolling_token_windows(
            token_list=harness.tok_encode(text),
            prefix_token=harness.prefix_token_id,
            max_seq_len=harness.max_length,
            context_len=harness.max_length - stride + 1,
        )
    ]
    return -sum(nats for nats, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True))


if __name__ == "__main__":
    main()
