"""Files that are elsewhere: `http(s)://` by Python itself, everything else (`s3://`, `gs://`, …) by fsspec."""

import urllib.request
from typing import BinaryIO, cast

from qlip.errors import InputError, MissingExtra, one_line

TIMEOUT_S = 60


def require_scheme(url: str) -> None:
    """Check that URLs of this kind can be read here.

    Raises:
        InputError: the scheme is unknown, or needs a library that is not installed.
    """
    scheme = url.split("://")[0]
    if scheme in ("http", "https"):
        return
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise MissingExtra(
            f"{url}: {scheme}:// needs more libraries ({one_line(error)}): pip install 'open-qlip[remote]'"
        ) from error
    except ValueError as error:
        raise InputError(f"{url}: no way to read {scheme}:// ({one_line(error)})") from error


def open_url(url: str) -> BinaryIO:
    """Open a file for one reading from front to back; raises what the libraries do."""
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=TIMEOUT_S)
    import fsspec

    return cast(BinaryIO, fsspec.open(url, "rb").open())


def glob_url(pattern: str) -> list[str]:
    """The files that a pattern with `*` finds, sorted.

    Raises:
        InputError: the server has no listing, or nothing was found.
    """
    if pattern.startswith(("http://", "https://")):
        raise InputError(f"{pattern}: a web server does not say what it has: name shards as {{00000..00127}}.tar")
    import fsspec

    try:
        files = fsspec.open_files(pattern, "rb")
    except Exception as error:  # each of its file systems has errors of its own
        raise InputError(f"{pattern}: cannot be listed ({one_line(error)})") from error
    scheme = pattern.split("://")[0]
    if not files:
        raise InputError(f"{pattern}: nothing there")
    return sorted(f"{scheme}://{file.path.split('://')[-1]}" for file in files)
