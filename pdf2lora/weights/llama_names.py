"""Names and shapes of a Llama's weights in Meta's and in Hugging Face's layout."""

META_EMBEDDING, META_HEAD, META_NORM = "tok_embeddings.weight", "output.weight", "norm.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

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
META_ROTARY_WEIGHTS = ("attention.wq.weight", "attention.wk.weight")
