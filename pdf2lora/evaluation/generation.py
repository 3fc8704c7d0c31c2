"""Text that a model generates from a prompt, and the negative log-likelihood of each token of a text."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

from pdf2lora.tokens import Encoder, Tokens


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tokens,
    encoder: Encoder,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], object] = lambda piece: None,
) -> str:
    """The continuation of bos and the prompt, (num_tokens,), until an end token or max_new_tokens.

    model: a PeftModel or a LlamaForCausalLM. It is in eval mode afterwards.
    temperature: 0 takes the most probable token. A higher value draws from the whole distribution; one seed gives the
        same draws on one kind of machine.
    on_text: receives each piece of text as soon as it is generated.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    input_ids = torch.from_numpy(np.concatenate([[encoder.bos], prompt])).to(device)[None]
    # These values replace those of the model's own generation_config.json: base and adapted model use the same ones.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    streamer = _TextStreamer(encoder, on_text)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=encoder.eos,
            streamer=streamer,
            **sampling,
        )
    return streamer.text


class _TextStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes text on token by token. The bytes of an incomplete character wait for the next token."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]):
        self.tokenizer = encoder.tokenizer
        self.on_text = on_text
        self.received_prompt = False
        self.tokens: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if not self.received_prompt:
            self.received_prompt = True
            return
        self.tokens += value.flatten().tolist()
        self._pass_on(self.tokenizer.decode(self.tokens))

    def end(self) -> None:
        self._pass_on(self.tokenizer.decode(self.tokens), is_last=True)

    def _pass_on(self, text: str, *, is_last: bool = False) -> None:
        if len(text) > len(self.text) and (is_last or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self.on_text(text[len(self.text) :])
            self.text = text


@torch.no_grad()
def nats_per_token(causal_lm: Any, tokens: Tokens, encoder: Encoder) -> NDArray[np.float64]:
    """-log p of each token of a short text, (num_tokens,), given bos and the earlier tokens."""
    causal_lm.eval()
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.from_numpy(np.concatenate([[encoder.bos], tokens])).to(device)
    logits = causal_lm(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    return np.asarray(F.cross_entropy(logits, ids[1:], reduction="none").double().cpu().numpy())
