"""Words for samples: their own captions, or sentences about the names of their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlip.data.samples import BadSample
from qlip.data.values import printable, read_text
from qlip.errors import InputError, one_line
from qlip.guarded import parse_json

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a small photo of the {}.",
    "this is a {}.",
    "{}",
)


@dataclass(frozen=True)
class Captioner:
    """Words for a sample: its own caption, one of its captions, or its label's names put into templates.

    Attributes:
        names: for each label its names, the first the usual one; empty if samples have captions.
        templates: sentences with `{}` where the name goes.
    """

    names: Sequence[Sequence[str]] = ()
    templates: Sequence[str] = ("a photo of a {}.",)

    @property
    def sentences(self) -> list[list[str]]:
        """All that it may say of each label: the usual name in every template, then the others."""
        return [
            [template.replace("{}", name) for name in names for template in self.templates] for names in self.names
        ]

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> str:
        """The sample's caption; a labelled one draws its name (half the time the usual one) and its template.

        Raises:
            BadSample: it has neither caption nor a label with a name.
        """
        if "caption" in sample:
            return sample["caption"]
        if captions := sample.get("captions"):
            return captions[int(rng.integers(len(captions)))]
        label = sample.get("label")
        if label is None:
            raise BadSample(sample["key"], "neither a caption nor a label: leave it out")
        if not isinstance(label, int):
            raise BadSample(
                sample["key"], f"label {label!r} is no number: number the classes, or name the column caption"
            )
        if not 0 <= label < len(self.names):
            remedy = f"give a class-name file of at least {label + 1} names" if label >= 0 else "leave it out"
            raise BadSample(sample["key"], f"label {label} has no name: {remedy}")
        names = self.names[label]
        name = names[0] if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
        return self.templates[int(rng.integers(len(self.templates)))].replace("{}", name)


def class_sentences(path: str | Path | None) -> list[list[str]]:
    """What `Captioner` may say of the classes of a file, in our templates; of no file nothing.

    Raises:
        InputError: the file is missing or of another form.
    """
    return Captioner(read_class_names(path), TEMPLATES).sentences if path else []


def read_class_names(path: str | Path) -> list[list[str]]:
    """Read class names: a JSON list with a name, a list of names or {"names": [...]} for each label.

    Raises:
        InputError: the file is missing or of another form.
    """
    return [names for names, _ in read_classes(path)]


def read_classes(path: str | Path) -> list[tuple[list[str], str | None]]:
    """Names, and the synset id (`wnid`) where there is one, for each label; see `read_class_names`.

    Raises:
        InputError: the file is missing or of another form.
    """
    try:
        entries = parse_json(read_text(path))
    except (OSError, InputError) as error:
        raise InputError(f"{path}: not a readable JSON file of class names ({one_line(error)})") from error
    entries = entries if isinstance(entries, list) else [None]
    names = [e["names"] if isinstance(e, dict) and "names" in e else e for e in entries]
    names = [[n] if isinstance(n, str) else n for n in names]
    if not all(isinstance(n, list) and n and all(map(_is_name, n)) for n in names):
        raise InputError(f'{path}: expected a list with a name, a list of names or {{"names": [...]}} a label')
    synsets = [e.get("wnid") if isinstance(e, dict) else None for e in entries]
    return [(n, s if isinstance(s, str) else None) for n, s in zip(names, synsets, strict=True)]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip()) and printable(name) == name
