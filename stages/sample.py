"""sample: models/base, models/adapter, data/split/test.jsonl -> data/samples.json

The opening of some test documents, what base and adapted model write after it, what stands there, and how much each
token of the true text surprises them. It is the same again on one kind of machine; on another, a draw may fall
differently, and so may all the text after it.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdf2lora.documents.records import Document, read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.generation import continuation, nats_per_token
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import Sample, read_params
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.manifest import require_intact
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.processes import single_instance
from pdf2lora.tokens import Encoder

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/split/test.jsonl")
SAMPLES = Path("data/samples.json")
DIGITS = 3  # of nats, after the point


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    require_intact(BASE, made_by="convert")
    encoder = Encoder.load(BASE)
    encoder.require_context(params.sample.prompt_tokens + params.sample.max_new_tokens, key="sample.max_new_tokens")
    documents = read_documents(TEST)[: params.sample.num_documents]

    with machine_metrics("sample"):
        model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)
        samples = [
            sample(model, encoder, document, params.sample)
            for document in tqdm(documents, desc="sample", unit="document", disable=None)
        ]

    write_json(SAMPLES, samples)
    print(f"sample: {len(samples)} test documents opened, {params.sample.max_new_tokens} tokens written by each model")


def sample(model: Any, encoder: Encoder, document: Document, settings: Sample) -> dict[str, object]:
    """One entry of data/samples.json; `tokens` are the pieces of prompt and truth with their nats."""
    opening = document.text[: 40 * (settings.prompt_tokens + settings.max_new_tokens)]  # no need to encode all of it
    encoding = encoder.tokenizer.encode(opening, add_special_tokens=False)
    ends = [end for _, end in encoding.offsets][: settings.prompt_tokens + settings.max_new_tokens]
    ids = encoder.encode([opening])[0][: len(ends)]
    prompt_end = ends[: settings.prompt_tokens][-1]
    written, nats = {}, {}
    for name in ("base", "adapted"):
        with model.disable_adapter() if name == "base" else nullcontext():
            written[name] = continuation(
                model,
                ids[: settings.prompt_tokens],
                encoder,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
            )
            nats[name] = nats_per_token(model, ids, encoder).round(DIGITS).tolist()
    return {
        "document": document.id,
        "prompt": opening[:prompt_end],
        "truth": opening[prompt_end : ends[-1]],
        **written,
        "tokens": [
            {"text": opening[begin:end], "base_nats": base, "adapted_nats": adapted}
            for begin, end, base, adapted in zip([0, *ends], ends, nats["base"], nats["adapted"], strict=False)
        ],
    }


if __name__ == "__main__":
    main()
