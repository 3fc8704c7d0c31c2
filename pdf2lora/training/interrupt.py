"""Stops a training on SIGTERM, Ctrl-C or the end of the terminal; the loop then saves a checkpoint."""

import signal
from types import FrameType
from typing import Any

from pdf2lora.runtime.launcher import STOP_SIGNALS


class Interrupt:
    """Records the first stop signal while the block runs.

    A second Ctrl-C ends the process at once. A second SIGTERM or SIGHUP is ignored: if the first signal went to all
    processes, dvc ends too, and then runtime/processes.py sends SIGTERM once more.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, SIGHUP is ignored and stays ignored
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for other, before in self._handlers.items():
            signal.signal(other, before if other == signal.SIGINT else signal.SIG_IGN)
