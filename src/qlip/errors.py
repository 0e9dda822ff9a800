"""The one exception type for what a person can mend, and the checks that all parts share."""

import operator
from typing import Any


class InputError(ValueError):
    """Bad input: a file, a field or an argument that the caller can correct.

    The message is one line that names the thing and says the remedy. The command line prints it without
    a traceback and exits with 1; any other exception is a defect of ours and keeps its traceback.
    """


class MissingExtra(InputError, ImportError):
    """A library of an extra is not installed; the message says how to install it."""


class SharedError(InputError):
    """Raised on every process of a run, in the same words: one of them need say it."""


def one_line(error: BaseException) -> str:
    """What went wrong, on one line, without the file's name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def as_integer(name: str, value: Any) -> int:
    """A value as Python's integer: numpy's and torch's integers count as integers.

    Raises:
        InputError: it is none; names the field.
    """
    try:
        if isinstance(value, bool):
            raise TypeError("a truth value is no number")
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is {value!r}: it must be an integer") from error
