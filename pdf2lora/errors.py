"""The one kind of failure that is the user's to mend, and how a stage reports it.

A message names the key or the file, the value that was found, the rule it breaks and the remedy, in one line.
Everything else that goes wrong is a fault of the program and keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Params, data or a checkpoint that cannot be used; `str(error)` is what the user reads."""


def report_input_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a stage's `main`: an InputError becomes `error: ...` on stderr and exit status 1, without a traceback."""

    @functools.wraps(main)
    def reported() -> None:
        try:
            main()
        except InputError as error:
            sys.exit(f"error: {error}")

    return reported
