"""Values of files that somebody else wrote, brought to text, labels and lines: the one place for it.

| value | as text (captions) | as a label | about a sample (licence, author, source, url) |
| --- | --- | --- | --- |
| null, NaN, blank | none | none | none |
| string | itself | "3", "3.0"; "NA", "null" and the like are none | itself |
| bytes | decoded as UTF-8 | decoded as UTF-8 | decoded as UTF-8 |
| 3, 3.0, Decimal(3) | refused | 3 | "3", "3.0", "3" |
| date, time | refused | refused | as ISO 8601 |
| anything else | refused | refused | as JSON |

Text is valid Unicode. A byte order mark at the beginning of a file or of bytes is no part of it, and lines end at
`\\n` only: captions may hold U+2028 and U+0085.
"""

import codecs
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from qlip.errors import InputError

_NO_LABEL = frozenset({"", "na", "n/a", "<na>", "nan", "null", "none"})
_INTEGER = re.compile(r"[+-]?\d{1,30}(\.0*)?", re.ASCII)


def text_of(value: Any) -> str | None:
    """A value as text; None where there is none.

    Raises:
        InputError: it is no text, or no valid Unicode.
    """
    if _is_missing(value):
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        value = decode(bytes(value))
    if not isinstance(value, str):
        raise InputError(f"is {reprlib.repr(value)}, not text")
    if printable(value) != value:
        raise InputError(f"is {reprlib.repr(value)}, not valid Unicode")
    return value if value.strip() else None


def texts_of(value: Any) -> list[str]:
    """A value, or the items of a list, as texts; those that are none are left out.

    Raises:
        InputError: as `text_of`.
    """
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in map(text_of, values) if text is not None]


def label_of(value: Any) -> int | None:
    """A value as the number of a class; None where there is none.

    Raises:
        InputError: it is no integer of 64 bits.
    """
    if isinstance(value, str | bytes):
        value = (text_of(value) or "").strip()
        if value.lower() in _NO_LABEL:
            return None
        number = int(value.partition(".")[0]) if _INTEGER.fullmatch(value) else None
    elif _is_missing(value):
        return None
    else:
        number = _integer(value)
    if number is None or abs(number) >> 63:
        raise InputError(f"is {reprlib.repr(value)}, not the number of a class: number the classes")
    return number


def about_of(value: Any) -> str | None:
    """What a file says about a sample, such as its author, as text; None where it says nothing.

    Raises:
        InputError: it holds bytes or strings that are no text.
    """
    if _is_missing(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, str | bytes):
        return text_of(value)
    try:
        return text_of(json.dumps(value, ensure_ascii=False, default=about_of))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"is {reprlib.repr(value)}, which cannot be written as text") from error


def decode(contents: bytes) -> str:
    """Bytes of a file as text.

    Raises:
        InputError: they are not UTF-8; says what to do.
    """
    refuse_utf16(contents)
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"is not UTF-8 (byte 0x{byte:02x} at {error.start:,}): save it as UTF-8") from error


def refuse_utf16(contents: bytes) -> None:
    """Check how the text of a file begins.

    Raises:
        InputError: it is UTF-16 or UTF-32.
    """
    if contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in contents[:4]:
        raise InputError("is UTF-16 or UTF-32, or not text: save it as UTF-8")


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, or a pipe, as text.

    Raises:
        OSError: it cannot be read.
        InputError: it is not UTF-8. The message does not name the file.
    """
    return decode(Path(path).read_bytes())


def lines(text: str) -> list[str]:
    """The lines of a text, without blanks around them; blank ones are left out."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def printable(text: str) -> str:
    """As valid Unicode: half a surrogate pair, as in a file name that is not UTF-8, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _integer(value: Any) -> int | None:
    """An integer, or a number that is one; not a truth value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return None
