"""Text that a model generates from prompts, and the negative log-likelihood of each token of a text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from pdf2lora.model.architectures import sliding_window
from pdf2lora.model.cuda_graph import capture
from pdf2lora.model.forward import Forward, ReferenceForward
from pdf2lora.params import Sample
from pdf2lora.tokens import Encoder, Tokens

# Up to this size, a pass of the fused kernels over all texts takes less time than transformers needs for one token:
# about 45 ms and 85 ms for a 3B on one H200.
MAX_TOKENS_OF_A_PASS = 4096


@torch.no_grad()
def generate(
    forward: Forward,
    prompts: Sequence[Tokens],
    encoder: Encoder,
    settings: Sample,
    on_text: Callable[[str], object] | None = None,
) -> list[str]:
    """Continues each prompt, (num_tokens,), until an end token or settings.max_new_tokens. bos comes before a prompt.

    All prompts are one batch. The same prompts and seed give the same texts on one kind of machine.

    forward: its model is in eval mode afterwards.
    on_text: receives each piece of text as soon as it is generated; for a single prompt only.
    """
    forward.model.eval()
    device = forward.head.device
    starts = [np.concatenate([[encoder.start], prompt]) for prompt in prompts]
    length = max(map(len, starts)) + settings.max_new_tokens
    window = sliding_window(forward.model.config)  # the fused kernels have none
    is_long = len(starts) * length > MAX_TOKENS_OF_A_PASS or (window is not None and length > window)
    uses_cache = isinstance(forward, ReferenceForward) or is_long
    streamer = _TextStreamer(encoder, prompts[0], on_text) if on_text else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        continued = (_continue_with_cache if uses_cache else _continue_with_passes)(
            forward, starts, encoder, settings, streamer
        )
    return [
        _decode(encoder, prompt, new)[len(_decode(encoder, prompt)) :]
        for prompt, new in zip(prompts, continued.tolist(), strict=True)
    ]


def _decode(encoder: Encoder, prompt: Tokens, new: Sequence[int] = ()) -> str:
    """The text of prompt and new tokens. Alone, the new tokens of Llama 2 or Mistral would lose their first space."""
    return encoder.tokenizer.decode([*prompt.tolist(), *new])


def _continue_with_cache(
    forward: Forward, starts: Sequence[Tokens], encoder: Encoder, settings: Sample, streamer: BaseStreamer | None
) -> Tensor:
    """The new tokens, (texts, at most max_new_tokens), of transformers' generate()."""
    model, device = forward.model, forward.head.device
    length = max(map(len, starts))
    input_ids = torch.full((len(starts), length), encoder.eos)
    attention_mask = torch.zeros_like(input_ids)
    for row, start in enumerate(starts):  # padding on the left: all rows continue at the same position
        input_ids[row, length - len(start) :] = torch.from_numpy(start)
        attention_mask[row, length - len(start) :] = 1
    # These values replace those of the model's own generation_config.json: base and adapted model use the same ones.
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    sequences: Tensor = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=encoder.eos,
        streamer=streamer,
        **sampling,
    )
    return sequences[:, length:]


def _continue_with_passes(
    forward: Forward, starts: Sequence[Tokens], encoder: Encoder, settings: Sample, streamer: BaseStreamer | None
) -> Tensor:
    """The same without a cache: each token takes a pass over the whole texts, on a GPU as a CUDA graph.

    Causal attention ignores the padding on the right.
    """
    device = forward.head.device
    length = max(map(len, starts)) + settings.max_new_tokens
    texts = torch.full((len(starts), length), encoder.eos, device=device)
    for row, start in enumerate(starts):
        texts[row, : len(start)] = torch.from_numpy(start)
    rows = torch.arange(len(starts), device=device)
    last = torch.tensor([len(start) - 1 for start in starts], device=device)  # position of the newest token
    logits = torch.empty(len(starts), forward.head.weight.shape[0], device=device)
    ends = torch.tensor(_end_tokens(forward.model), device=device)

    def update_logits() -> None:
        logits.copy_(forward.head.logits(forward(texts)[rows, last]))

    graph = capture(update_logits, forward.model) if device.type == "cuda" else None
    if streamer:
        streamer.put(texts[:, : len(starts[0])].cpu())
    is_finished = torch.zeros(len(starts), dtype=torch.bool, device=device)
    new: list[Tensor] = []
    while len(new) < settings.max_new_tokens and not is_finished.all():
        graph.replay() if graph else update_logits()
        if settings.temperature > 0:
            token = torch.multinomial((logits / settings.temperature).softmax(-1), 1)[:, 0]
        else:
            token = logits.argmax(-1)
        token = token.where(~is_finished, encoder.eos)
        new.append(token)
        last += 1
        texts[rows, last] = token
        is_finished |= torch.isin(token, ends)
        if streamer:
            streamer.put(token.cpu())
    if streamer:
        streamer.end()
    return torch.stack(new, dim=1)


def _end_tokens(model: Any) -> list[int]:
    """The ids that end a text."""
    ids = model.config.eos_token_id
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


class _TextStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes text on, token by token. It keeps the bytes of an incomplete character until the next token."""

    def __init__(self, encoder: Encoder, prompt: Tokens, on_text: Callable[[str], object]):
        self.encoder, self.prompt = encoder, prompt
        self.on_text = on_text
        self.received_prompt = False
        self.tokens: list[int] = []
        self.num_characters = len(_decode(encoder, prompt))  # that are known or were passed on

    def put(self, value: torch.Tensor) -> None:
        if self.received_prompt:
            self.tokens += value.flatten().tolist()
            self._pass_on()
        self.received_prompt = True

    def end(self) -> None:
        self._pass_on(is_last=True)

    def _pass_on(self, *, is_last: bool = False) -> None:
        text = _decode(self.encoder, self.prompt, self.tokens)
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
