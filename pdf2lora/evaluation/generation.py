"""Text that a model generates from prompts, and the negative log-likelihood of each token of a text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder, Tokens


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Tokens],
    encoder: Encoder,
    settings: Sample,
    on_text: Callable[[str], object] | None = None,
) -> list[str]:
    """Continues each prompt, (num_tokens,), until an end token or settings.max_new_tokens. bos comes before a prompt.

    All prompts are one batch. The same prompts and seed give the same texts on one kind of machine.

    model: a PeftModel or a LlamaForCausalLM. It is in eval mode afterwards.
    on_text: receives each piece of text as soon as it is generated; for a single prompt only.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    length = 1 + max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), encoder.eos)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # padding on the left: all rows continue at the same position
        ids = np.concatenate([[encoder.start], prompt])
        input_ids[row, length - len(ids) :] = torch.from_numpy(ids)
        attention_mask[row, length - len(ids) :] = 1
    # These values replace those of the model's own generation_config.json: base and adapted model use the same ones.
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        sequences = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=settings.max_new_tokens,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=encoder.eos,
            streamer=_TextStreamer(encoder, on_text) if on_text else None,
            **sampling,
        )
    return [encoder.tokenizer.decode(ids) for ids in sequences[:, length:].tolist()]


class _TextStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes text on, token by token. It keeps the bytes of an incomplete character until the next token."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]):
        self.tokenizer = encoder.tokenizer
        self.on_text = on_text
        self.received_prompt = False
        self.tokens: list[int] = []
        self.num_characters = 0  # that were passed on

    def put(self, value: torch.Tensor) -> None:
        if self.received_prompt:
            self.tokens += value.flatten().tolist()
            self._pass_on()
        self.received_prompt = True

    def end(self) -> None:
        self._pass_on(is_last=True)

    def _pass_on(self, *, is_last: bool = False) -> None:
        text = self.tokenizer.decode(self.tokens)
        if len(text) > self.num_characters and (is_last or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self.on_text(text[self.num_characters :])
            self.num_characters = len(text)


@torch.no_grad()
def token_nats(causal_lm: Any, tokens: Tokens, encoder: Encoder) -> NDArray[np.float64]:
    """-log p of each token of a short text, (num_tokens,), given bos and the earlier tokens."""
    causal_lm.eval()
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.from_numpy(np.concatenate([[encoder.start], tokens])).to(device)
    logits = causal_lm(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    return np.asarray(F.cross_entropy(logits, ids[1:], reduction="none").double().cpu().numpy())
