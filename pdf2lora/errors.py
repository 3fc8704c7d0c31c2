"""The one kind of failure that is the user's to mend, and how a stage reports it.

A message names the key or the file, the value that was found, the rule it breaks and the remedy, in one line.
Everything else that goes wrong is a fault of the program and keeps its traceback.
"""

import errno
import functools
import sys
from collections.abc import Callable

# What the system refuses, and what can be done about it.
REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "give yourself the right to it",
    errno.EPERM: "give yourself the right to it",
}


class InputError(ValueError):
    """Params, data or a checkpoint that cannot be used; `str(error)` is what the user reads."""


def report_input_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a stage's `main`: an InputError becomes `error: ...` on stderr and exit status 1, without a traceback.

    So does what the system refuses: a full disk, a folder that may not be written to.
    """

    @functools.wraps(main)
    def reported() -> None:
        try:
            main()
        except InputError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}; {REMEDIES[error.errno]}, then run again")

    return reported
