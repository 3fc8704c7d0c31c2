"""The head of a causal language model: hidden states -> logits."""

from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor

from pdf2lora.errors import InputError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest logit
TOLERANCE_8_BIT = 0.01


class Head(NamedTuple):
    """logits = cap * tanh(z / cap), z = scale * (hidden W^T + bias). Without cap: logits = z.

    weight: (vocabulary, hidden), frozen; bias: (vocabulary,).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @classmethod
    def of(cls, causal_lm: Any) -> "Head":
        """Reads the head from a transformers model. check_causal_lm() checks that the result is complete."""
        config = causal_lm.config.get_text_config()
        embeddings = causal_lm.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return cls(embeddings.weight, getattr(embeddings, "bias", None), float(scale), softcap)

    def transform_(self, product: Tensor) -> Tensor:
        """hidden W^T -> logits, in place."""
        if self.bias is not None:
            product += self.bias
        if self.scale != 1.0:
            product *= self.scale
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary)."""
        return self.transform_(hidden @ self.weight.t())


@torch.no_grad()
def check_causal_lm(causal_lm: Any) -> None:
    """Compares the logits of decoder and Head with the model's own logits on a few tokens. Checks that it is causal.

    For a model that passes, the training loss equals transformers' own loss.

    Raises InputError if the model computes its logits in another way, or they depend on later tokens.
    """
    name = type(causal_lm).__name__
    was_training = causal_lm.training
    causal_lm.eval()
    # LLM.int8 selects outlier features from all tokens, so a later token changes earlier logits. A threshold of 0 turns
    # the outliers off.
    layers_8bit = [module for module in causal_lm.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    thresholds = [layer.state.threshold for layer in layers_8bit]
    for layer in layers_8bit:
        layer.state.threshold = 0.0
    device = causal_lm.get_input_embeddings().weight.device
    count = min(97, causal_lm.config.get_text_config().vocab_size)
    ids = (torch.arange(8, device=device) * 37 % count)[None]
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % count
    try:
        logits, changed = (causal_lm(input_ids=row, use_cache=False).logits.float() for row in (ids, other))
        hidden = decoder_of(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state
        computed = Head.of(causal_lm).logits(hidden).float()
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"models/base is a {name}, which pdf2lora cannot run as a decoder-only language model: "
            f"{' '.join(str(error).split())[:200]}. Use another base model."
        ) from error
    finally:
        causal_lm.train(was_training)
        for layer, threshold in zip(layers_8bit, thresholds, strict=True):
            layer.state.threshold = threshold
    limit = (TOLERANCE_8_BIT if layers_8bit else TOLERANCE[hidden.dtype]) * logits.abs().max()
    if computed.shape != logits.shape or not (computed - logits).abs().max() <= limit:
        raise InputError(
            f"models/base is a {name}; its logits are not a product of its last hidden states with its output "
            "embeddings (with bias, scale and soft cap). pdf2lora does not know its loss. Use another base model."
        )
    if not (changed - logits)[:, :-1].abs().max() <= limit:
        raise InputError(
            f"models/base is a {name}; its logits depend on later tokens, so it is not a causal language model. Use "
            "another base model."
        )


def causal_lm_of(model: Any) -> Any:
    """The transformers model of a PeftModel; any other model is returned as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(causal_lm: Any) -> Any:
    """The module from token ids to the last hidden states, without the head."""
    decoder = causal_lm.get_decoder()
    return decoder if decoder is not causal_lm else getattr(causal_lm, causal_lm.base_model_prefix)
