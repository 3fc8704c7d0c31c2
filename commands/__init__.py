"""What a user runs by hand. No command is a stage, and none changes dvc.lock."""

from pdf2lora.runtime.startup import prepare_process

prepare_process()  # before any command imports torch
