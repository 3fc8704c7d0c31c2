"""Speed, memory and quality, compared with other libraries."""

from pdf2lora.runtime.startup import prepare_process

prepare_process()  # before any benchmark imports torch
