"""Stop signals during a training."""

import os
import signal
from collections.abc import Iterator

import pytest

from pdf2lora.training.interrupt import STOP_SIGNALS, Interrupt


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Sets Python's own handlers before and after each test, for example if pytest runs under nohup."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_recorded(number: signal.Signals) -> None:
    with Interrupt() as interrupt:
        assert interrupt.received is None

        send(number)

        assert interrupt.received is number


@pytest.mark.parametrize("first", STOP_SIGNALS)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_sigterm_or_sighup_is_ignored(first: signal.Signals, second: signal.Signals) -> None:
    with Interrupt() as interrupt:
        send(first)
        send(second)

        assert interrupt.received is first


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_ctrl_c_after_a_first_signal_ends_at_once(first: signal.Signals) -> None:
    with Interrupt(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        send(first)
        send(signal.SIGINT)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """As under nohup, and for a job in the background of a shell."""
    signal.signal(number, signal.SIG_IGN)

    with Interrupt() as interrupt:
        send(number)

        assert interrupt.received is None


@pytest.mark.parametrize("sent", [None, *STOP_SIGNALS])
def test_the_handlers_before_come_back(sent: signal.Signals | None) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    with Interrupt():
        if sent:
            send(sent)

    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_the_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    with pytest.raises(ZeroDivisionError), Interrupt():
        1 / 0  # noqa: B018

    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
