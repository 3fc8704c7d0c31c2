"""A tiny random Llama in Hugging Face's layout: 2 layers, hidden size 64, a byte-level tokenizer.

Also settings and documents to train it, and helpers that compare trained models.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from helpers import make_document, write_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from pdf2lora.params import Compute, Lora, Quantization, Section, Train
from pdf2lora.runtime.manifest import write_manifest
from pdf2lora.token_files import encode_texts, write_tokens
from pdf2lora.tokens import Encoder, Sequences

BOS, EOS, END_OF_TURN, PAD = range(256, 260)
VOCABULARY_SIZE = 260
CONTEXT_LENGTH = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.1,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>"]

QUANTIZATION = Quantization(bits=4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, placement="auto")
LORA = Lora(
    r=8,
    lora_alpha=32,
    lora_dropout=0.1,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    use_dora=False,
    use_rslora=False,
    init_lora_weights=True,
)
COMPUTE = Compute(
    num_processes=1,
    seq_length=32,
    kernels="reference",
    compute_dtype="float32",
    attention="sdpa",
    deterministic=False,
)
TRAIN = Train(
    effective_batch=2,
    num_train_epochs=1,
    learning_rate=0.01,
    lr_scheduler_type="cosine",
    warmup_steps=0.25,
    weight_decay=0.0,
    max_grad_norm=1.0,
    optim="paged_adamw_8bit",
    gradient_checkpointing="full",
    logging_steps=1,
    eval_steps=2,
    save_steps=2,
    seed=0,
    keep="last",
    replay="none",
    replay_share=0.1,
    early_stopping_patience="none",
    report_to="none",
)
S = TypeVar("S", bound=Section)
Model = TypeVar("Model", bound=torch.nn.Module)

# What PEFT says of a base elsewhere than in models/base, transformers 5.23 of names that 5.17 has no others for, and
# bitsandbytes of paged optimizers on a CPU.
quiet = pytest.mark.filterwarnings(
    "ignore:The PEFT config's", "ignore:`(gradient|is_gradient)_checkpointing:FutureWarning", "ignore:Paged optimizers"
)


def changed(section: S, **changes: object) -> S:
    """A section of the settings with changes, checked like params.yaml."""
    return type(section)(**(section.model_dump() | changes))


def by_key(**sections: Section) -> dict[str, Any]:
    """The settings of these sections as changes of params.yaml: {"train.seed": 0, ...}."""
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.model_dump().items()}


TINY_SETTINGS = by_key(quantization=QUANTIZATION, lora=LORA, compute=COMPUTE, train=TRAIN)


def write_tiny_llama(folder: Path, *, seed: int = 0, eos: int | list[int] = EOS, **changes: Any) -> Path:
    """config.json, model.safetensors, tokenizer.json, the manifest; random weights that are large enough to matter.

    changes: of the LlamaConfig.
    """
    config = LlamaConfig(**(SIZES | {"tie_word_embeddings": False, "eos_token_id": eos} | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_manifest(folder)
    return folder


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, numbered in the order of ByteLevel's alphabet, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_texts(file: Path, texts: list[str]) -> Path:
    """Writes the texts as documents of one split."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_documents(file, [make_document(f"{file.stem}-{number}.pdf", text) for number, text in enumerate(texts)])
    return file


def write_split(project: Path, split: str, texts: list[str], base: Path) -> None:
    """Writes the texts as one split of a project, and their tokens. No texts are near-duplicates."""
    write_texts(project / f"data/split/{split}.jsonl", texts)
    if split == "test":
        (project / "data/split/test_groups.json").write_text(json.dumps(list(range(len(texts)))))
    (project / "data/tokens").mkdir(exist_ok=True)
    encoder = Encoder.load(base)
    write_tokens(project / "data/tokens", split, encode_texts(encoder, texts), encoder)


def fill_b(model: Model, *, std: float = 0.05) -> Model:
    """Draws the LoRA matrices B, which are zero before training, so that the adapter changes the output."""
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=std)
    return model


def random_sequences(num_sequences: int, *, seq_length: int = 32, seed: int = 0) -> Sequences:
    """Random bytes. All of them but the first are targets."""
    stream = np.random.default_rng(seed).integers(0, BOS, size=num_sequences * seq_length + 1, dtype=np.int32)
    return Sequences(stream, seq_length)


def tensors_of(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and targets of all sequences."""
    inputs, targets = sequences.batch(np.arange(len(sequences)))
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters that training changes, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
