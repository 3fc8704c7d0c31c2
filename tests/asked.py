"""A module for test_memory's children, as probe.py is one for those of find_batch."""

import math
import os
import signal
from pathlib import Path

import torch

from pdf2lora.errors import InputError


def prepare(*numbers_or_fault):
    """What the child keeps: a list that its answers may change."""
    for fault in numbers_or_fault:
        if isinstance(fault, str):
            refuse() if fault == "refuse" else run_out_of(fault)
    return [os.getpid(), *numbers_or_fault]


def process_id(prepared):
    return prepared[0]


def product(prepared, factor):
    return math.prod(prepared[1:]) * factor


def count(prepared):
    prepared.append(1)
    return len(prepared)


def double(number):
    """Asks for nothing prepared."""
    return 2 * number


def run_out_of(*prepared_and_kind):
    kind = prepared_and_kind[-1]
    if kind == "CPU":
        torch.empty(2**55)
    raise {"GPU": torch.OutOfMemoryError, "numpy": MemoryError}[kind]("no memory is left")


def die_of(prepared, signal_number):
    os.kill(os.getpid(), signal_number)


def be_killed(prepared, times, diary: Path):
    """The first children that are asked are killed; the diary has a line for each that was asked."""
    with diary.open("a") as lines:
        lines.write(f"{prepared[0]}\n")
    if len(diary.read_text().splitlines()) <= times:
        die_of(prepared, signal.SIGKILL)
    return product(prepared, 1)


def leave(prepared):
    os._exit(3)


def refuse(*prepared):
    raise InputError("compute.attention: 'flash_attention_2' cannot run here")


def stumble(prepared):
    raise KeyError("lm_head")


def miss_a_library(prepared):
    raise ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")
