"""The files of a folder, without what other programs leave beside data.

What is left out: hidden files and folders (`._cat.jpg`, `.DS_Store`, `.git`, `.ipynb_checkpoints`), `__MACOSX`,
`Thumbs.db`, `desktop.ini`, editors' copies (`cat.txt~`, `#cat.txt#`), and the like.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "$recycle.bin", "system volume information", "@eadir", "lost+found"}
    | {".ipynb_checkpoints", ".git", ".svn", ".hg", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd"}
)
_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})


def is_left(name: str) -> bool:
    """Whether a file or folder is one that other programs leave beside data, by its name alone."""
    copy = name.endswith("~") or (len(name) > 2 and name[0] == name[-1] == "#")
    return copy or name.startswith((".", "~$")) or name.lower() in _FILES | _FOLDERS


def is_in_left(path: str) -> bool:
    """Whether a path, as archives and listings hold it, leads to or into what `is_left`.

    It may lead through a hidden folder, unless that is one that programs are known to make beside data.
    """
    *folders, name = path.replace("\\", "/").rstrip("/").split("/")
    return (is_left(name) and name != "..") or any(folder.lower() in _FOLDERS for folder in folders)


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that a pattern finds, sorted."""
    return sorted(path for path in folder.glob(pattern) if not is_left(path.name))


def walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The files of a folder, however deep, as relative paths; each folder's files in order, then its folders.

    Links are followed. A folder is visited once for each outermost sub-folder: so loops of links end, and two
    classes may be links to one folder.

    Raises:
        OSError: a folder cannot be listed.
    """
    root = _identity(folder)
    files, folders = _listed(folder)
    yield from files
    for name in folders:
        yield from _below(os.fspath(folder), name, {root})


def _below(root: str, place: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    folders = [place]
    while folders:
        place = folders.pop()
        identity = _identity(os.path.join(root, place))
        if identity in visited:
            continue
        visited.add(identity)
        files, inside = _listed(os.path.join(root, place))
        yield from (os.path.join(place, name) for name in files)
        folders += [os.path.join(place, name) for name in reversed(inside)]


def _listed(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Names of files (and of links that lead nowhere) and of folders, sorted."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_left(entry.name):
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(files), sorted(folders)


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
