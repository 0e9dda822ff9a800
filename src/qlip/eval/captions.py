"""How good captions are: BLEU@4, METEOR and CIDEr by pycocoevalcap, and whether a caption names a class.

The one file that imports pycocoevalcap (extra `captions`). Its tokenizer (Stanford's, for the Penn Treebank) and
METEOR are Java programs. Where there is no Java, `plain_tokens` finds the words, METEOR is left out, and the
results say both.
"""

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlip.errors import InputError, MissingExtra, one_line
from qlip.eval.interval import Number, mean_of
from qlip.eval.results import record, write_results
from qlip.files import checksum
from qlip.guarded import read_json

PROTOCOL = "captions"
INTERVALS = "CIDEr: 95 %, 1,000 bootstrap resamples of the pictures' scores, percentiles, seed 0"
PENN_TREEBANK = "Penn Treebank (Stanford CoreNLP 3.4.1), lower case, without punctuation"
PLAIN = "plain, since there is no Java: lower case, runs of letters, digits and apostrophes"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

ImageId = int | str
Predictions = Mapping[ImageId, str]
References = Mapping[ImageId, Sequence[str]]

# Nouns whose plural has another ending than those that `_singulars` takes off.
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
}


def evaluate_captions(predictions: Path, references: Path, out: Path | None = None) -> dict[str, Any]:
    """Score a file of captions and write `results.json`.

    Args:
        predictions: as COCO's server takes them, a JSON list of `{"image_id": …, "caption": …}`, one a picture.
        references: COCO's annotations, `{"annotations": [{"image_id": …, "caption": …}, …]}`. Pictures without a
            prediction are left out, and counted.
        out: folder for results.json; by default results/NAME/captions, NAME being that of `predictions`.

    Returns:
        what stands in results.json, and `folder`, where that is.

    Raises:
        InputError: pycocoevalcap is missing, a file cannot be read, or a caption has no references.
    """
    captions, wanted = read_predictions(predictions), read_references(references)
    if unknown := [image for image in captions if image not in wanted]:
        raise InputError(
            f"{references} has no caption for {len(unknown)} of {len(captions)} pictures, as image_id "
            f"{unknown[0]!r}: give the references of these pictures"
        )
    has_java = find_java()
    results = caption_scores(captions, {image: wanted[image] for image in captions}, has_java)
    data = {
        "sources": [predictions.name, references.name],
        "num_samples": len(captions),
        "hash": f"{checksum(predictions)[:8]}{checksum(references)[:8]}",
        "failed": [],
        "without_prediction": len(wanted) - len(captions),
    }
    settings = {
        "tokenization": PENN_TREEBANK if has_java else PLAIN,
        "meteor": "1.5" if has_java else "left out: there is no Java",
        "pycocoevalcap": version("pycocoevalcap"),
        "num_references": sum(len(wanted[image]) for image in captions),
    }
    name = predictions.stem
    saved = record(PROTOCOL, [{"name": name}], data, settings, {name: results}, "cpu", INTERVALS)
    folder = out or Path("results", name, PROTOCOL)
    write_results(folder, saved)
    return saved | {"folder": str(folder)}


def find_java() -> bool:
    """Whether this machine has Java; where not, the log says what follows."""
    if shutil.which("java"):
        return True
    logging.getLogger("qlip").warning(
        "there is no Java: no METEOR, and words are found in another way (%s)", PLAIN
    )
    return False


def caption_scores(predictions: Predictions, references: References, has_java: bool) -> dict[str, Number]:
    """BLEU@4 of all pictures together, METEOR, and CIDEr with its interval.

    Args:
        predictions: by picture the caption.
        references: by picture the captions of people; of the same pictures.
        has_java: use the Penn Treebank's tokenization and METEOR.

    Returns:
        `bleu4` in [0, 1], `meteor` in [0, 1] with Java, `cider` in [0, 10]: papers print these times 100. In CIDEr
        a word counts the more, the fewer of the pictures have it in their references.

    Raises:
        InputError: pycocoevalcap is missing.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise MissingExtra("captions are scored by pycocoevalcap: pip install 'open-qlip[captions]'") from error
    tokenize = _treebank_tokens if has_java else _plain
    said = tokenize({image: [caption] for image, caption in predictions.items()})
    wanted = tokenize({image: references[image] for image in predictions})
    bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    _, ciders = Cider().compute_score(wanted, said)
    numbers = {"bleu4": Number(float(bleu[3]))}
    if has_java:
        numbers["meteor"] = Number(float(Meteor().compute_score(wanted, said)[0]))
    return numbers | {"cider": mean_of(torch.tensor(ciders))}


def plain_tokens(caption: str) -> str:
    """The words of a caption in lower case, with spaces between them."""
    return " ".join(_WORD.findall(caption.casefold()))


def names_class(caption: str, names: Sequence[str]) -> bool:
    """Whether a caption has one of a class's names, in whole words, whatever case and number.

    Args:
        caption: a sentence.
        names: what the class is called, as `qlip.data.captions.read_class_names` gives it for a label. The words
            of a name must all be there, one after the other.
    """
    said = [_singulars(word) for word in plain_tokens(caption).split()]
    for name in names:
        wanted = [_singulars(word) for word in plain_tokens(name).split()]
        for start in range(len(said) - len(wanted) + 1):
            if wanted and all(a & b for a, b in zip(said[start:], wanted, strict=False)):
                return True
    return False


def named_classes(caption: str, classes: Sequence[Sequence[str]]) -> list[int]:
    """Which of several classes a caption names: those with the longest name in it, in words.

    So a caption with "mountain lion" names that and not "lion".

    Args:
        caption: see `names_class`.
        classes: names of each.

    Returns:
        their numbers, several where they share that name; none if there is no name in it.
    """
    lengths = [
        max((len(plain_tokens(name).split()) for name in names if names_class(caption, [name])), default=0)
        for names in classes
    ]
    most = max(lengths, default=0)
    return [i for i, length in enumerate(lengths) if length == most] if most else []


def read_predictions(path: Path) -> dict[ImageId, str]:
    """Captions by picture.

    Raises:
        InputError: the file is of another form, or has two captions for a picture.
    """
    captions: dict[ImageId, str] = {}
    for image, caption in _entries(path, _read(path), 'a list of {"image_id": …, "caption": …}'):
        if image in captions:
            raise InputError(f"{path} has two captions for image_id {image!r}: leave one of them")
        captions[image] = caption
    return captions


def read_references(path: Path) -> dict[ImageId, list[str]]:
    """The captions of people by picture.

    Raises:
        InputError: the file is of another form.
    """
    found = _read(path)
    form = '{"annotations": [{"image_id": …, "caption": …}, …]}'
    captions: dict[ImageId, list[str]] = {}
    for image, caption in _entries(path, found.get("annotations") if isinstance(found, dict) else None, form):
        captions.setdefault(image, []).append(caption)
    return captions


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): name a JSON file") from error


def _entries(path: Path, rows: Any, form: str) -> list[tuple[ImageId, str]]:
    try:
        found = [(row["image_id"], row["caption"]) for row in rows]
    except (TypeError, KeyError):
        found = []
    if not found or not all(isinstance(i, int | str) and isinstance(caption, str) for i, caption in found):
        raise InputError(f"{path}: expected COCO's captions, {form}")
    return found


def _plain(captions: References) -> dict[ImageId, list[str]]:
    return {image: [plain_tokens(caption) for caption in group] for image, group in captions.items()}


def _treebank_tokens(captions: References) -> dict[ImageId, list[str]]:
    """By pycocoevalcap's tokenizer, which reads a caption a line; METEOR divides by three bars."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {
        image: [{"caption": " ".join(caption.replace("|||", " ").split())} for caption in group]
        for image, group in captions.items()
    }
    found = PTBTokenizer().tokenize(lines)
    if {image: len(group) for image, group in found.items()} != {i: len(group) for i, group in captions.items()}:
        raise InputError("Java's tokenizer gave back another number of captions: is this Java whole?")
    return found


def _singulars(word: str) -> set[str]:
    """What a word may be the plural of, and itself."""
    found = {word, _IRREGULAR.get(word, word)}
    if word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.add(word[:-2])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        if word.endswith("ves"):
            found |= {word[:-3] + "f", word[:-3] + "fe"}
    return found
