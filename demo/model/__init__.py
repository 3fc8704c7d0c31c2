"""How the demo's base model and its tokenizer were made. Nothing in the pipeline runs this."""
