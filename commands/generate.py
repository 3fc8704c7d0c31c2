"""generate: a prompt -> what the base and the adapted model write after it, as they write it

    make generate PROMPT="The sea level"

How long and how boldly they write is set in the section `sample` of params.yaml.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import read_params

BASE = Path("models/base")
ADAPTER = Path("models/adapter")


@report_input_errors
def main() -> None:
    params = read_params()
    prompt = " ".join(sys.argv[1:])
    if not prompt.strip():
        raise InputError('PROMPT: is empty, must be the beginning of a text; make generate PROMPT="The sea level"')
    for folder in (BASE, ADAPTER):
        if not folder.is_dir():
            raise InputError(f"{folder}: is not there; run dvc repro first")
    from pdf2lora.evaluation.generation import continuation  # torch only after what can be wrong without it
    from pdf2lora.model.loading import load_adapter, load_base
    from pdf2lora.tokens import Encoder

    encoder = Encoder.load(BASE)
    tokens = encoder.encode([prompt])[0]
    encoder.require_context(len(tokens) + params.sample.max_new_tokens, key="sample.max_new_tokens")
    model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)

    for name in ("base", "adapted"):
        print(f"--- {name} ---\n{prompt}", end="", flush=True)
        with model.disable_adapter() if name == "base" else nullcontext():
            continuation(
                model,
                tokens,
                encoder,
                max_new_tokens=params.sample.max_new_tokens,
                temperature=params.sample.temperature,
                seed=params.sample.seed,
                on_text=lambda piece: print(piece, end="", flush=True),
            )
        print("\n")


if __name__ == "__main__":
    main()
