"""User errors: their exception, and how a stage reports them.

A message has the key or the file, the value, the rule and the remedy. All other exceptions are bugs of this program and
keep their traceback.
"""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable

REMEDIES = {
    errno.ENOSPC: "Free space on that disk",
    errno.EDQUOT: "Free space in your quota",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Check the file's permissions",
    errno.EPERM: "Check the file's permissions",
}


class InputError(ValueError):
    """Invalid settings, data or model files. The text of the exception is the message to the user."""


def report_input_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a stage's `main`: a user error ends it with `error: ...` on stderr and exit status 1.

    User errors are those for which user_message returns a text. Ctrl-C also ends it with one line.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit("stopped by Ctrl-C. Finished work is kept.")
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            sys.exit(f"error: {message}")

    return wrapper


def user_message(error: Exception) -> str | None:
    """The line for the user, for an InputError, an error in REMEDIES or a lack of memory; None for other errors."""
    if isinstance(error, InputError):
        return str(error)
    message = _describe_system_error(error)
    return message and f"{message}, then run again. Finished work is kept."


def _describe_system_error(error: BaseException) -> str | None:
    """Cause and remedy; None for an error that is not in REMEDIES.

    The errors of safetensors have the number only in their message. torch's errors have no number: the message of a
    failed write names its file writer, and that of a failed allocation its CPU allocator.
    """
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "memory ran out. Free some (free -h shows it)"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error.filename or 'a file'}: {error.strerror}. {REMEDIES[error.errno]}"
    if (match := re.search(r"os error (\d+)", str(error))) and int(match[1]) in REMEDIES:
        return f"a file: {os.strerror(int(match[1]))}. {REMEDIES[int(match[1])]}"
    if error.__context__ and (message := _describe_system_error(error.__context__)):
        return message
    if "inline_container.cc" in str(error):
        return f"a checkpoint file is incomplete. {REMEDIES[errno.ENOSPC]}"
    return None
