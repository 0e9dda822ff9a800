"""A checkpoint as transformers loads it, with the code for who has not open-qlip."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlip.files import whole_file
from qlip.guarded import read_json
from qlip.model.hub import CONFIG, PREPROCESSOR
from qlip.model.qlip import QLIP

PACKAGE = Path(__file__).parents[2]
ENTRY, LOGITS = "integrations.transformers.modeling", "integrations.transformers.um3_logits"
_IMPORT = re.compile(r"^( *)from qlip\.(?:\w+\.)*(\w+) import", re.MULTILINE)
_MODULE = re.compile(r"^ *from qlip\.([\w.]+) import", re.MULTILINE)


def export(model: QLIP, out: Path) -> None:
    """Write a folder that `AutoModel`, `AutoImageProcessor` and `AutoTokenizer` of transformers load.

    They do once `qlip.integrations.transformers` is imported, and with `trust_remote_code=True` where open-qlip is
    not installed: the modules that make the model are in the folder. `qlip.load` reads it as well.

    Args:
        model: the tokenizer.
        out: the folder; made if need be, and the files of a checkpoint that is there are replaced.

    Raises:
        InputError: the folder cannot be written.
    """
    model.save(out)
    entry = ENTRY.rpartition(".")[2]
    towers = ("vision", "text", "decoder")
    config = {f"{tower}_config": {"model_type": f"qlip_{tower}_model"} for tower in towers}
    auto_map = {"AutoConfig": f"{entry}.QLIPConfig", "AutoModel": f"{entry}.QLIPModel"}
    _update(out / CONFIG, config | {"model_type": "qlip", "auto_map": auto_map})
    if (out / PREPROCESSOR).exists():
        auto_map = {f"Auto{kind}": f"{entry}.QLIP{kind}" for kind in ("ImageProcessor", "Processor")}
        names = {"image_processor_type": "QLIPImageProcessor", "processor_class": "QLIPProcessor"}
        _update(out / PREPROCESSOR, names | {"auto_map": auto_map})
    write_code(out, ENTRY)


def write_code(out: Path, entry: str) -> None:
    """Put a module of ours into a folder, and those that it needs, for who has not open-qlip.

    Args:
        out: the folder.
        entry: the module, `ENTRY` or `LOGITS`.

    Raises:
        InputError: the folder cannot be written.
    """
    for name, text in _sources(entry).items():
        with whole_file(out / f"{name}.py") as path:
            path.write_text(text, encoding="utf-8")


def write_generation(out: Path, settings: dict[str, Any]) -> None:
    """Say how `generate` of transformers draws tokens by default; without the file it takes the 50 likeliest.

    Raises:
        InputError: the folder cannot be written.
    """
    with whole_file(out / "generation_config.json") as path:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _update(file: Path, changes: dict[str, Any]) -> None:
    """Change some values of a JSON file, of its sections too."""
    values = read_json(file)
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    with whole_file(file) as path:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _sources(entry: str) -> dict[str, str]:
    """The entry and all modules of ours that it needs, as modules of one flat package: names and contents."""
    texts: dict[str, str] = {}
    todo = [entry]
    while todo:
        module = todo.pop()
        name = module.rpartition(".")[2]
        if name not in texts:
            texts[name] = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            todo += _MODULE.findall(texts[name])
    origin = (
        f"# Of open-qlip {version('open-qlip')}, Apache-2.0; written by `qlip export --format transformers`.\n"
    )
    entry = entry.rpartition(".")[2]
    # transformers copies what the entry imports, and not what that imports.
    others = sorted(texts.keys() - {entry} - {match[1] for match in _IMPORT.findall(texts[entry])})
    texts[entry] += "\n\n" + "".join(f"from .{name} import __doc__ as _{name}  # noqa: E402\n" for name in others)
    return {name: origin + _IMPORT.sub(r"\1from .\2 import", text) for name, text in sorted(texts.items())}
