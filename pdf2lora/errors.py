"""The one kind of failure that is the user's to mend, and how a stage reports it.

A message names the key or the file, the value that was found, the rule it breaks and the remedy, in one line.
Everything else that goes wrong is a fault of the program and keeps its traceback.
"""

import errno
import functools
import os
import re
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
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            sys.exit(f"error: {refusal}, then run again: what is finished is kept")

    return reported


def _refusal(error: BaseException) -> str | None:
    """What the system refused, in words; None where the error is another one.

    safetensors gives the system's number in the text alone; torch's writer not even that: the place in its source is
    where every write ends that came short.
    """
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error.filename or 'a file'}: {error.strerror}; {REMEDIES[error.errno]}"
    if (found := re.search(r"os error (\d+)", str(error))) and int(found[1]) in REMEDIES:
        return f"a file: {os.strerror(int(found[1]))}; {REMEDIES[int(found[1])]}"
    if error.__context__ and (inner := _refusal(error.__context__)):
        return inner
    if "inline_container.cc" in str(error):
        return f"a checkpoint could not be written to its end; {REMEDIES[errno.ENOSPC]}"
    return None
