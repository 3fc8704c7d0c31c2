from collections.abc import Callable
from subprocess import Popen

import pytest

from pdf2lora.errors import InputError, report_input_errors

STAGE = """
from pdf2lora.errors import InputError, report_input_errors

@report_input_errors
def main():
    raise {raised}

main()
"""


def test_input_error_is_one_line_on_stderr(start_python: Callable[..., Popen[str]]) -> None:
    stage = start_python(STAGE.format(raised="InputError('lora.r is 0; it must be at least 1')"))
    out, err = stage.communicate(timeout=30)
    assert (stage.returncode, out, err) == (1, "", "error: lora.r is 0; it must be at least 1\n")


def test_ctrl_c_is_one_line_on_stderr(start_python: Callable[..., Popen[str]]) -> None:
    stage = start_python(STAGE.format(raised="KeyboardInterrupt"))
    out, err = stage.communicate(timeout=30)
    assert (stage.returncode, out, err) == (1, "", "stopped by Ctrl-C. Finished work is kept.\n")


@pytest.mark.parametrize("raised", ["ValueError('a bug')", "KeyError('a bug')"])
def test_other_exceptions_keep_their_traceback(start_python: Callable[..., Popen[str]], raised: str) -> None:
    stage = start_python(STAGE.format(raised=raised))
    err = stage.communicate(timeout=30)[1]
    assert stage.returncode == 1
    assert err.startswith("Traceback (most recent call last)")
    assert "a bug" in err
    assert "error: " not in err


def test_decorated_main_keeps_its_name_and_docstring() -> None:
    calls = []

    @report_input_errors
    def main() -> None:
        """extract: PDFs -> text"""
        calls.append("called")

    assert main() is None
    assert calls == ["called"]
    assert (main.__name__, main.__doc__) == ("main", "extract: PDFs -> text")


def test_input_error_is_a_value_error() -> None:
    assert isinstance(InputError("corpus: empty"), ValueError)
    assert str(InputError("corpus: empty")) == "corpus: empty"
