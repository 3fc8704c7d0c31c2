"""The files of a base model: Meta's and Hugging Face's layout, tokenizers, safetensors files, the merged adapter."""
