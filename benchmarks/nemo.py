"""Tokens/s and peak memory of a LoRA training step of NeMo AutoModel, for Llama-3.1-8B's shape on one GPU.

    python -m benchmarks.nemo <lora_dropout> <batch> [...]

The settings are those of NeMo's own benchmark (llama3_1_8b_peft_benchmark.yaml): transformers' Llama with Liger's
kernels, NeMo's Triton kernels for LoRA, rank 16 on all linear layers, 4,096 tokens, frozen weights in bfloat16. The
weights are random. NeMo does not work with the versions in requirements.txt. So install it in another environment:
pip install nemo-automodel==0.7.0 liger-kernel==0.8.5. The program prints one line of JSON for each batch.
"""

import json
import sys
import time
from typing import Any

import torch
from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from transformers import LlamaConfig

SEQ_LENGTH = 4096
VOCABULARY = 128_256
STANDARD_DEVIATION = 0.02
STEPS, STEPS_TO_WARM_UP = 5, 2
ACCUMULATION = 4  # 16 in NeMo's benchmark; both have the same speed
GIB = 2**30
DEVICE = torch.device("cuda")


def main() -> None:
    dropout, *batches = sys.argv[1:]
    model = build(float(dropout))
    for batch in batches:
        result = {"system": "nemo-automodel", "lora_dropout": float(dropout), "seq_length": SEQ_LENGTH}
        print(json.dumps(result | measure(model, int(batch))), flush=True)


def build(dropout: float) -> Any:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    )
    lora = PeftConfig(
        target_modules=["*_proj"],
        dim=16,
        alpha=32,
        dropout=dropout,
        use_memory_efficient_lora=False,
        use_triton=True,
    )
    torch.manual_seed(0)
    with DEVICE:
        model = NeMoAutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", force_hf=True, peft_config=lora
        )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "lora" not in name:
            torch.nn.init.normal_(parameter, std=STANDARD_DEVIATION)
    return model.train()


def measure(model: Any, batch: int) -> dict[str, Any]:
    """Of STEPS optimizer steps; the first ones are not timed."""
    compute_loss = MaskedCrossEntropy()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, weight_decay=0.01)
    numbers = torch.Generator().manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for number in range(STEPS):
            if number == STEPS_TO_WARM_UP:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            optimizer.zero_grad()
            for _ in range(ACCUMULATION):
                inputs = torch.randint(VOCABULARY, (batch, SEQ_LENGTH), generator=numbers).to(DEVICE)
                logits = model(input_ids=inputs).logits
                loss = compute_loss(logits=logits, labels=inputs.roll(-1, dims=1)) / inputs.numel()
                (loss / ACCUMULATION).backward()
            optimizer.step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return {"batch": batch, "out_of_memory": True}
    seconds = (time.perf_counter() - begin) / (STEPS - STEPS_TO_WARM_UP)
    return {
        "batch": batch,
        "tokens_per_s": round(batch * SEQ_LENGTH * ACCUMULATION / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "loss": round(loss.item(), 3),
    }


if __name__ == "__main__":
    main()
