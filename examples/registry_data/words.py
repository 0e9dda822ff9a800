"""What names mean: base forms, synonyms and definitions by WordNet, and which names are held out."""

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

# WordNet's files of what can be drawn: animals, artifacts, bodies, food, objects, phenomena, plants
_THINGS = {"05", "06", "08", "13", "17", "19", "20"}
_VISIBLE = _THINGS | {"18", "25"}  # persons and shapes, too

# WordNet's rules that take a noun's ending to its base form
_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)


def _word_lists() -> dict[str, frozenset[str]]:
    """The lists of `word_lists.txt`, by name.

    uncounted: nouns without a plural, which take no article.
    categories: what stands before the thing in the names of some sets: "seafood squid".
    abstract: words of names that say what an icon does in a program, or name a brand: nothing that an image shows.
    """
    text = (Path(__file__).parent / "word_lists.txt").read_text(encoding="utf-8")
    return {name: frozenset(words.split()) for name, words in re.findall(r"\[(\w+)\]\n([^\[]*)", text)}


_LISTS = _word_lists()
# Words that end the noun which a name is about: "slice of pizza" is about a slice
_AFTER_THE_NOUN = re.compile(r",| (?:of|with|in|on|at|from|for|over|under|behind|holding|wearing|and|without) ")
_PERSON = re.compile(r"(man|woman|person|boy|girl|child|baby|mermaid|horse|couple|family) \w+ing\b")
_PLURAL = re.compile(r"ics$|ing$|(?<![suia])s$")
_NO_ARTICLE = re.compile(r"(a|an|the|two|three|four|five|no|my|your|mount|saint|st|men|women|people) ")
_COUNTED = re.compile(r"(?<=\w) (one|two|three|four|five|six|seven|eight|nine|alt|alternate)$")


def phrase(text: str) -> str:
    """A name in lower case with single spaces: "Hot-Dog_2" → "hot dog"."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower().replace("’", "'")
    return " ".join(word for word in re.findall(r"[^\W_]+(?:'[^\W_]+)*", text) if not word.isdigit())


def natural(name: str, nouns: "Nouns") -> str:
    """An icon's name without what orders it in its set: "sofa two" → "sofa", "seafood squid" → "squid"."""
    name = _COUNTED.sub("", name)
    first, _, rest = name.partition(" ")
    return rest if first in _LISTS["categories"] and nouns.base(name) is None and nouns.can_be_seen(rest) else name


def says_what_is_seen(name: str, nouns: "Nouns", only_last: bool) -> bool:
    """Whether a name is about what one sees, and not about what a program does.

    Args:
        name: of an icon or clip art.
        nouns: WordNet.
        only_last: its last word must be what is seen, not any.
    """
    words = name.split()
    seen = any(nouns.can_be_seen(word) for word in (words[-1:] if only_last else words))
    is_abstract = any(len(word) == 1 or word in _LISTS["abstract"] for word in words)
    return seen and len(words) <= 5 and not is_abstract


def with_article(name: str, nouns: "Nouns") -> str:
    """A name as a sentence takes it: "red apple" → "a red apple", "dogs" and "snow" stay as they are."""
    subject = _AFTER_THE_NOUN.split(name)[0]
    head = subject.split()[-1]
    is_singular = nouns.base(head) == head and head not in _LISTS["uncounted"] and not _PLURAL.search(head)
    if not (is_singular or _PERSON.match(name)) or _NO_ARTICLE.match(name) or name.startswith("flag of"):
        return f"the {name}" if name.startswith("flag of") else name
    is_vowel = name[0] in "aeio" or re.match(r"u(?!ni|s[abe]|ti|ku|ro|ra)|hour|x ray|honest", name)
    return f"{'an' if is_vowel else 'a'} {name}"


@dataclass(frozen=True)
class Sense:
    """A noun's usual meaning as a thing, or, if it has none, its usual one.

    Attributes:
        number: WordNet's offset.
        is_thing: whether it can be drawn: an animal, an artifact, food, …
        names: its synonyms, the usual one first.
        definition: the gloss, without examples.
    """

    number: str
    is_thing: bool
    names: tuple[str, ...]
    definition: str


class Nouns:
    """WordNet's nouns, from the files `index.noun`, `data.noun` and `noun.exc`."""

    def __init__(self, folder: Path):
        """Read the files."""
        self._senses = {line[:8]: line for line in _lines(folder / "data.noun")}
        self._exceptions = dict(line.split()[:2] for line in _lines(folder / "noun.exc"))
        self._usual: dict[str, str] = {}
        for line in _lines(folder / "index.noun"):
            fields = line.split()
            numbers = fields[6 + int(fields[3]) :]
            things = (number for number in numbers if self._senses[number][9:11] in _THINGS)
            self._usual[fields[0].replace("_", " ")] = next(things, numbers[0])

    def base(self, name: str) -> str | None:
        """The base form of a noun, or None: "dogs" → "dog", "quickly" → None."""
        if name in self._usual:
            return name
        stem, _, last = name.rpartition(" ")
        candidates = [self._exceptions.get(last, "")]
        candidates += [last[: -len(old)] + new for old, new in _ENDINGS if last.endswith(old)]
        for candidate in filter(None, candidates):
            if f"{stem} {candidate}".strip() in self._usual:
                return f"{stem} {candidate}".strip()
        return None

    def sense(self, name: str) -> Sense | None:
        """The usual meaning of a noun in any form."""
        base = self.base(name)
        if base is None:
            return None
        number = self._usual[base]
        head, gloss = self._senses[number].split(" | ", 1)
        fields = head.split()
        names = tuple(fields[4 + 2 * i].lower().replace("_", " ") for i in range(int(fields[3], 16)))
        return Sense(number, fields[1] in _THINGS, names, re.split(r'; "|;', gloss)[0].strip())

    def can_be_seen(self, name: str) -> bool:
        """Whether a noun, in any form, means a thing, a person or a shape."""
        base = self.base(name)
        return base is not None and self._senses[self._usual[base]][9:11] in _VISIBLE

    def aliases(self, name: str) -> set[str]:
        """The names whose usual meaning this is, its base form among them; empty for what is no noun."""
        sense = self.sense(name)
        if sense is None:
            return set()
        return {other for other in sense.names if self._usual.get(other) == sense.number}


def imagenet_names(open_clip: Path) -> list[str]:
    """The 1,000 class names that `open_clip` evaluates with."""
    tree = ast.parse((open_clip / "open_clip" / "zero_shot_metadata.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "IMAGENET_CLASSNAMES":
            return ast.literal_eval(node.value)
    raise ValueError("open_clip no longer has IMAGENET_CLASSNAMES")


@dataclass(frozen=True)
class HeldOut:
    """Names whose pictures no training sees.

    A tenth of the nouns that name pictures, chosen among those that name things by a hash of their meaning, so
    that the choice depends neither on which sources are there nor on their order. ImageNet's names, and those
    that are a word of one, are never chosen: photographs of them are in every training set.

    Attributes:
        names: alias → the name that stands for it.
    """

    names: dict[str, str]

    @classmethod
    def choose(cls, names: Iterable[str], nouns: Nouns, seen: Collection[str], share: float = 0.25) -> "HeldOut":
        """Choose among names.

        Args:
            names: of all pictures, each as often as it occurs.
            nouns: WordNet.
            seen: names that are never held out.
            share: of the things that ImageNet does not name; half of the nouns are such.
        """
        shown = {base for name in seen for base in _parts(phrase(name), nouns)}
        chosen: dict[str, str] = {}
        for name, _ in sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0])):
            sense, aliases = nouns.sense(name), nouns.aliases(name)
            if sense and sense.is_thing and not aliases & shown and _hashes_below(sense.number, share):
                chosen = dict.fromkeys(aliases, name) | chosen  # the most used of them stands for all
        return cls(chosen)

    def mentioned(self, text: str, nouns: Nouns) -> bool:
        """Whether words contain a held-out name, in any form."""
        return not self.names.keys().isdisjoint(_parts(phrase(text), nouns))

    def concept(self, name: str, nouns: Nouns) -> str | None:
        """The held-out name that a name is an alias of, if any."""
        return self.names.get(nouns.base(name) or name)


def _parts(text: str, nouns: Nouns) -> set[str]:
    """All runs of up to four words, and their base forms: "hot dogs" → hot, dogs, dog, hot dogs, hot dog."""
    words = re.sub(r"'s?\b", "", text).split()
    runs = {" ".join(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1)}
    return runs | {base for run in runs if (base := nouns.base(run))}


def _hashes_below(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2**64


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
