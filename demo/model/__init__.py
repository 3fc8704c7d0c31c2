"""Programs that made the demo's base model and its tokenizer. The pipeline does not run them."""
