"""generate: prompts -> the continuations of the base and of the adapted model

    make generate PROMPT="The sea level"
    python -m commands.generate < prompt.txt            one prompt from standard input
    python -m commands.generate --prompts prompts.txt   a batch of prompts, one per line

The prompt comes from the environment variable PROMPT or from standard input, so neither make nor a shell expands it.
The section `sample` of params.yaml sets the number of tokens, the temperature and the seed.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import read_params
from pdf2lora.paths import ADAPTER, BASE
from pdf2lora.runtime.inputs import require_inputs


@report_input_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    prompts = read_prompts(parser.parse_args().prompts)
    params = read_params()
    require_inputs(BASE, ADAPTER)
    # torch is imported after the checks that do not need it: the import takes seconds
    from pdf2lora.evaluation.generation import generate
    from pdf2lora.model.forward import build_forward
    from pdf2lora.model.initialization import restore_trained_base
    from pdf2lora.model.kernel_choice import choose_exact_kernels
    from pdf2lora.model.loading import load_adapter, load_base, read_config
    from pdf2lora.tokens import Encoder, require_context

    encoder = Encoder.load(BASE)
    tokens = encoder.encode(prompts)
    longest = max(map(len, tokens))
    require_context(BASE, {"tokens of the prompt": longest, "sample.max_new_tokens": params.sample.max_new_tokens})
    kernels = choose_exact_kernels(params.compute, params.quantization, params.lora, read_config(BASE))
    model = load_adapter(load_base(BASE, params.quantization, params.compute), ADAPTER)

    for name in ("base", "adapted"):
        if name == "adapted":
            restore_trained_base(model, BASE, ADAPTER, params.lora)
        with model.disable_adapter() if name == "base" else nullcontext():
            forward = build_forward(model, kernels)
            if len(prompts) == 1:
                print(f"--- {name} ---\n{prompts[0]}", end="", flush=True)
                generate(forward, tokens, encoder, params.sample, lambda piece: print(piece, end="", flush=True))
                print("\n")
            else:
                for prompt, text in zip(prompts, generate(forward, tokens, encoder, params.sample), strict=True):
                    print(f"--- {name} ---\n{prompt}{text}\n")


def read_prompts(file: Path | None) -> list[str]:
    """The lines of the file, or one prompt from PROMPT or standard input.

    Raises InputError if the prompt is missing or not UTF-8, or the file does not exist.
    """
    if file is not None and not file.is_file():
        raise InputError(f"--prompts: {file} does not exist. Give a text file with one prompt per line.")
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8-sig")  # Windows programs write a byte order mark
            prompts = [line for line in text.split("\n") if line.strip()]
        else:
            prompt = os.environ.get("PROMPT", "")
            if not prompt and not sys.stdin.isatty():
                prompt = sys.stdin.read().removesuffix("\n")
            prompt.encode()  # bytes of PROMPT that are not UTF-8 are surrogates in the string
            prompts = [prompt] if prompt.strip() else []
    except UnicodeError as error:
        raise InputError(f"{file or 'the prompt'}: not UTF-8 ({error}). Convert it with iconv -t UTF-8.") from None
    if not prompts:
        raise InputError('The prompt is empty. Give the beginning of a text: make generate PROMPT="The sea level"')
    return prompts


if __name__ == "__main__":
    main()
