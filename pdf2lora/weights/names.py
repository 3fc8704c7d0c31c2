"""Weight names, shapes and data types of a Llama, in Meta's and in Hugging Face's layout."""

import torch

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


# Meta's name, Hugging Face's name, the dimension that model-parallel shards split (None: each has a copy), shape
WeightRow = tuple[str, str, int | None, tuple[str, ...]]


LAYER_WEIGHTS: tuple[WeightRow, ...] = (
    ("attention_norm.weight", "input_layernorm.weight", None, ("hidden",)),
    ("attention.wq.weight", "self_attn.q_proj.weight", 0, ("query", "hidden")),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0, ("key", "hidden")),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0, ("key", "hidden")),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1, ("hidden", "query")),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None, ("hidden",)),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0, ("intermediate", "hidden")),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0, ("intermediate", "hidden")),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1, ("hidden", "intermediate")),
)


ROTARY_WEIGHTS = ("attention.wq.weight", "attention.wk.weight")


EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"


NEW_EMBEDDING, NEW_HEAD = "model.embed_tokens.weight", "lm_head.weight"
