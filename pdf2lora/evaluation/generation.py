"""Text that a model writes after a prompt, and how much each token of a given text surprises it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

from pdf2lora.tokens import Encoder, Tokens


@torch.no_grad()
def continuation(
    model: Any,
    prompt: Tokens,
    encoder: Encoder,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], object] = lambda piece: None,
) -> str:
    """What the model writes after bos and the prompt, (num_tokens,), until it ends the text or reaches max_new_tokens.

    model: a PeftModel or a LlamaForCausalLM, left in eval mode.
    temperature: 0 takes the likeliest token each time; above it, tokens are drawn from the whole distribution, the
        same draws for the same seed on one kind of machine.
    on_text: gets each piece of text as soon as it is there.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    input_ids = torch.from_numpy(np.concatenate([[encoder.start], prompt])).to(device)[None]
    # What the checkpoint's own generation_config.json says of these is not wanted: both models are asked alike.
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    streamer = _Pieces(encoder, on_text)
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
            **how,
        )
    return streamer.text


class _Pieces(BaseStreamer):  # type: ignore[misc]
    """Hands on text as tokens come; bytes that are not yet a whole character wait for the next token."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]):
        self.tokenizer = encoder.tokenizer
        self.on_text = on_text
        self.prompt_is_in = False
        self.tokens: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_is_in:
            self.prompt_is_in = True
            return
        self.tokens += value.flatten().tolist()
        self._hand_on(self.tokenizer.decode(self.tokens))

    def end(self) -> None:
        self._hand_on(self.tokenizer.decode(self.tokens), is_last=True)

    def _hand_on(self, text: str, *, is_last: bool = False) -> None:
        if len(text) > len(self.text) and (is_last or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self.on_text(text[len(self.text) :])
            self.text = text


@torch.no_grad()
def nats_per_token(causal_lm: Any, tokens: Tokens, encoder: Encoder) -> NDArray[np.float64]:
    """-log p of each token of a short text, (num_tokens,), given bos and the tokens before it."""
    causal_lm.eval()
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.from_numpy(np.concatenate([[encoder.start], tokens])).to(device)
    logits = causal_lm(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    return np.asarray(F.cross_entropy(logits, ids[1:], reduction="none").double().cpu().numpy())
