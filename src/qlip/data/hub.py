"""Data sets of the `datasets` library, by name. The one file that imports it (extra `datasets`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlip.data.samples import COLUMNS, Samples, captions_of, describe, described, encoded_image
from qlip.errors import InputError, MissingExtra, one_line


class HubSamples(Samples):
    """A split of a data set, memory-mapped by the library, which also fetches and caches it."""

    def __init__(self, name: str):
        """Load it.

        Args:
            name: of the hub, or a folder, and behind a colon the split; "train" where there is none.

        Raises:
            InputError: the library is missing, it knows no such set, or the set has no pictures.
        """
        self._name, table = _load(name)
        import datasets

        pictures = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
        if not pictures:
            raise InputError(f"datasets:{self._name}: no column of pictures; its columns are {table.column_names}")
        self._image = "image" if "image" in pictures else pictures[0]
        table = table.select_columns([name for name in table.column_names if name in {self._image, *COLUMNS}])
        self._table = table.cast_column(self._image, datasets.Image(decode=False))
        folder = Path(name.partition(":")[0]).absolute()
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)
        self._folders = (folder, *map(Path, caches))  # the library writes absolute paths
        label = table.features.get("label")
        if isinstance(label, datasets.ClassLabel):
            self.class_names = tuple(label.names)

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        record = self._table[index]
        key = f"{self._name}:{index}"
        image = encoded_image(record[self._image], key, *self._folders)
        return {"image": image, "key": key} | describe(record, key)

    def captions(self) -> Iterator[str]:
        """Those of all rows."""
        yield from captions_of(described(self._table.remove_columns(self._image)))


def hub_texts(name: str, column: str) -> Iterator[str]:
    """The texts of a split of a data set, in order.

    Args:
        name: as that of `HubSamples`.
        column: which holds the text.

    Raises:
        InputError: the library is missing, it knows no such set, or the set has no such column.
    """
    name, table = _load(name)
    if column not in table.column_names:
        raise InputError(f"datasets:{name}: no column {column!r}; its columns are {table.column_names}")
    for record in table.select_columns([column]):
        yield record[column]


def _load(name: str) -> tuple[str, Any]:
    """A split by its name: the name with the split in it, and the library's table."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            f"datasets:{name} needs the library `datasets`: pip install 'open-qlip[datasets]'"
        ) from error
    path, _, split = name.partition(":")
    name = f"{path}:{split or 'train'}"
    try:
        return name, datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # the library raises almost anything
        raise InputError(f"datasets:{name}: cannot be loaded ({one_line(error)})") from error
