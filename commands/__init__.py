"""Programs that a user runs by hand. They are not stages and do not change dvc.lock."""

from pdf2lora.runtime.startup import prepare_process

prepare_process()  # before any command imports torch
