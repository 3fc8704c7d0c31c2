"""One file for each stage of dvc.yaml: it reads params, calls pdf2lora and writes outputs."""

from pdf2lora.runtime.processes import exit_with_parent
from pdf2lora.runtime.startup import prepare_process

prepare_process()  # before any stage imports torch
exit_with_parent()  # a stage, and each process that it starts, ends when its dvc ends
