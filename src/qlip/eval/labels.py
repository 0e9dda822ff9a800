"""Words for classes: ImageNet's names and templates, a file's, or what the data set calls its classes.

ImageNet's come out of the package `open_clip`, whose one file of words is read and not imported: the package needs
torchvision.
"""

import ast
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlip.data.captions import read_classes
from qlip.errors import InputError, MissingExtra

IMAGENET = "imagenet"
_SYNSETS = Path(__file__).with_name("imagenet_synsets.txt")
PLAIN_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Classes:
    """What labels mean.

    Attributes:
        names: the words that are told apart.
        place: for each label of the data its index in `names`.
        source: where the names are from, for the record.
        aliases: for each of `names` all that it may be called, a synset id too, in plain form.
    """

    names: tuple[str, ...]
    place: tuple[int, ...]
    source: str
    aliases: tuple[frozenset[str], ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise InputError(f"{self.source}: only {len(self.names)} class names, nothing to tell apart")

    def index(self, sample: dict[str, Any]) -> int:
        """The place of a sample's class among the names.

        Raises:
            InputError: it has no label, or one without a name.
        """
        label = label_of(sample)
        if label >= len(self.place):
            raise InputError(
                f"{sample.get('key')}: label {label}, but {self.source} has {len(self.place)} names: "
                "give the class names of this data with --classes"
            )
        return self.place[label]


def label_of(sample: dict[str, Any]) -> int:
    """A sample's label.

    Raises:
        InputError: it has none, or it is no number from 0 on.
    """
    label = sample.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        found = "no label" if label is None else f"label {label!r}"
        raise InputError(f"{sample.get('key')}: {found}: classes are numbered from 0, or have a folder each")
    return label


def find_classes(classes: str | None, folders: Sequence[str] = ()) -> Classes:
    """The class names for some data.

    Args:
        classes: "imagenet", a JSON file as `qlip.data.captions.read_class_names` takes it, or None for the data's
            own.
        folders: what the data calls its classes by label, where it does; a file's entries are then found by these
            names (or synset ids, `wnid`), so that some of the classes will do.

    Raises:
        InputError: no names, or they do not fit the data.
    """
    if classes is None:
        if not folders:
            raise InputError("the data does not name its classes: give the names with --classes")
        names = tuple(name.replace("_", " ") for name in folders)
        return Classes(
            names, tuple(range(len(names))), "the data", tuple(frozenset({_plain(name)}) for name in folders)
        )
    if classes == IMAGENET:
        entries, source = [[name] for name in imagenet_names()], "ImageNet's list in open_clip"
        aliases = [{_plain(name)} for (name,) in entries]
    else:
        read, source = read_classes(classes), Path(classes).name
        entries = [names for names, _ in read]
        aliases = [{_plain(name) for name in (*names, *filter(None, [synset]))} for names, synset in read]
    usual = tuple(names[0] for names in entries)
    return Classes(usual, _places(aliases, folders, source), source, tuple(map(frozenset, aliases)))


def imagenet_outputs(classes: Classes) -> list[int]:
    """Of each of the names the number of its class among ImageNet's 1,000, which are in the order of synset ids.

    Found by the synset id (`wnid`, or the class folder's name), else by a name as `imagenet_names` has it.

    Raises:
        InputError: a class is none of ImageNet's, or two are the same.
    """
    synsets = {synset: i for i, synset in enumerate(_SYNSETS.read_text(encoding="utf-8").split())}
    names: dict[str, int] = {}
    with suppress(InputError):  # without open_clip synset ids alone are known
        if not all(synsets.keys() & aliases for aliases in classes.aliases):
            names = {_plain(name): i for i, name in enumerate(imagenet_names())}
    outputs: list[int] = []
    for name, aliases in zip(classes.names, classes.aliases, strict=True):
        found = {synsets[a] for a in aliases & synsets.keys()} or {names[a] for a in aliases & names.keys()}
        if len(found) != 1 or found & set(outputs):
            raise InputError(
                f"{classes.source}: {name!r} is not one of ImageNet's 1,000 classes, which an ImageNet classifier "
                'needs: give its synset id, {"wnid": "n01443537", "names": […]} (names alone are looked up in '
                "open_clip, where it is installed), or leave class accuracy out, --classifier none"
            )
        outputs += found
    return outputs


def imagenet_names() -> list[str]:
    """The 1,000 names that CLIP models are evaluated with, in the order of the synset ids."""
    return ast.literal_eval(_open_clip("IMAGENET_CLASSNAMES"))


def imagenet_templates() -> list[str]:
    """The 80 sentences of CLIP, with `{}` for the name."""
    functions = _open_clip("OPENAI_IMAGENET_TEMPLATES")
    assert isinstance(functions, (ast.Tuple, ast.List))
    texts = [function.body for function in functions.elts if isinstance(function, ast.Lambda)]
    parts = [text.values for text in texts if isinstance(text, ast.JoinedStr)]
    return ["".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in part) for part in parts]


def _places(aliases: list[set[str]], folders: Sequence[str], source: str) -> tuple[int, ...]:
    """Of each label: by the folders' names, or, where no folder is named as a class is, by number."""
    found = [next((i for i, alias in enumerate(aliases) if _plain(name) in alias), None) for name in folders]
    known = [i for i in found if i is not None]
    if known and len(known) == len(folders):
        return tuple(known)
    if known:
        unknown = folders[found.index(None)]
        raise InputError(f"class folder {unknown!r} is not in {source}: rename it, or leave it out")
    if folders and len(folders) != len(aliases):
        raise InputError(
            f"the data has {len(folders)} classes ({folders[0]}, …), {source} {len(aliases)}, and no folder has "
            "the name of one: give the class names of this data with --classes"
        )
    return tuple(range(len(aliases)))


def _open_clip(name: str) -> ast.expr:
    """The value of a name in open_clip's file of words."""
    spec = find_spec("open_clip")
    places = [Path(root) / "zero_shot_metadata.py" for root in (spec and spec.submodule_search_locations) or ()]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise MissingExtra(
            "ImageNet's names and templates are in open_clip: pip install --no-deps open-clip-torch"
        )
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return node.value
    raise InputError(f"{file} has no {name}: install open-clip-torch 3")


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()
