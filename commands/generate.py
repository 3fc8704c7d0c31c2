"""generate: a prompt -> the continuations of the base and of the adapted model

    make generate PROMPT="The sea level"

The section `sample` of params.yaml sets the number of tokens, the temperature and the seed.
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
    settings = params.sample
    prompt = " ".join(sys.argv[1:])
    if not prompt.strip():
        raise InputError('PROMPT is empty. Give the beginning of a text: make generate PROMPT="The sea level"')
    for folder in (BASE, ADAPTER):
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist. Run dvc repro first.")
    # torch is imported after the checks that do not need it: the import takes seconds
    from pdf2lora.evaluation.generation import generate
    from pdf2lora.model.loading import load_adapter, load_base
    from pdf2lora.tokens import Encoder

    encoder = Encoder.load(BASE)
    tokens = encoder.encode([prompt])[0]
    encoder.require_context(len(tokens) + settings.max_new_tokens, key="sample.max_new_tokens")
    model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)

    for name in ("base", "adapted"):
        print(f"--- {name} ---\n{prompt}", end="", flush=True)
        with model.disable_adapter() if name == "base" else nullcontext():
            generate(
                model,
                tokens,
                encoder,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
                on_text=lambda piece: print(piece, end="", flush=True),
            )
        print("\n")


if __name__ == "__main__":
    main()
