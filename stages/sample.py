"""sample: models/base, models/adapter, data/split/test.jsonl -> data/samples.json"""

from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.evaluation.samples import sample_document
from pdf2lora.model.loading import load_adapter, load_base
from pdf2lora.params import read_params
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.manifest import require_intact
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.processes import single_instance
from pdf2lora.tokens import Encoder

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/split/test.jsonl")
SAMPLES = Path("data/samples.json")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    settings = params.sample
    require_intact(BASE, made_by="convert")
    encoder = Encoder.load(BASE)
    encoder.require_context(settings.prompt_tokens + settings.max_new_tokens, key="sample.max_new_tokens")
    documents = read_documents(TEST)[: settings.num_documents]

    with machine_metrics("sample"):
        model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)
        samples = [
            sample_document(model, encoder, document, settings)
            for document in tqdm(documents, desc="sample", unit="document", disable=None)
        ]

    write_json(SAMPLES, samples)
    print(f"sample: {len(samples)} test documents, {settings.max_new_tokens} tokens from each model")


if __name__ == "__main__":
    main()
