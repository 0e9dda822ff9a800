"""What a language model knows: multiple choice by lm-eval, its own model class, prompts and scores.

The one file that imports lm-eval (extra `language`). Documents are those of the hub that lm-eval names, or local
files; either way the task is lm-eval's own definition, and nothing but the place of the documents is changed.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlip.environment import resolve_device
from qlip.errors import InputError, MissingExtra, one_line
from qlip.eval.interval import Number
from qlip.eval.options import LanguageOptions
from qlip.eval.results import record, write_results
from qlip.files import checksum
from qlip.precision import warn_if_slow

PROTOCOL = "um3-text"
INTERVALS = "95 %: 1.96 of lm-eval's standard errors to either side, within 0 and 1"
FORMATS = {".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}  # file's ending → what `datasets` calls it
METRICS = ("acc", "acc_norm")


def evaluate_language(model: str, options: LanguageOptions, name: str | None = None) -> dict[str, Any]:
    """Measure a causal language model and write `results.json`.

    Args:
        model: a folder in the layout of transformers, or a hub id.
        options: tasks, documents, device.
        name: what the record calls the model; by default the folder's name.

    Returns:
        what stands in results.json, and `folder`, where that is. Numbers are called TASK_acc and, where lm-eval's
        task has it, TASK_acc_norm (log-likelihoods divided by the choices' characters).

    Raises:
        InputError: lm-eval is missing, or it cannot load the model, a task or its documents.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra(f"this needs lm-eval ({one_line(error)}): pip install 'open-qlip[language]'") from error
    place = resolve_device(options.device)
    device = str(place)
    warn_if_slow(place, getattr(torch, options.dtype))
    manager = TaskManager()
    with tempfile.TemporaryDirectory() as folder, _cut_requests() as cut:
        tasks = load_tasks(manager, options.task_names, options.data, Path(folder))
        try:
            network = HFLM(model, device=device, dtype=options.dtype, batch_size=options.batch_size)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{model}: transformers finds no causal language model ({one_line(error)})"
            ) from error
        found = lm_eval.simple_evaluate(network, tasks=tasks, limit=options.limit, task_manager=manager)
    name = name or Path(model).name
    samples = {task: found["samples"][task] for task in options.task_names}
    data = {
        "sources": [f"{task} of {_place(found['configs'][task])}" for task in samples],
        "num_samples": sum(map(len, samples.values())),
        "hash": _hash(samples),
        "failed": [],
    }
    settings = {
        "tasks": {
            task: {
                "documents": len(rows),
                "num_fewshot": found["n-shot"][task],
                "version": found["versions"][task],
            }
            for task, rows in samples.items()
        },
        "limit": options.limit,
        "batch_size": options.batch_size,
        "max_length": network.max_length,
        "sequences_cut": cut[0],
        **{package: version(package) for package in ("lm-eval", "transformers", "datasets")},
    }
    about = {"name": name, "weights": _weights(model), "dtype": options.dtype}
    results = {name: _numbers(found["results"])}
    saved = record(PROTOCOL, [about], data, settings, results, device, INTERVALS)
    out = options.out or Path("results", name, PROTOCOL)
    write_results(out, saved)
    return saved | {"folder": str(out)}


def load_tasks(manager: Any, names: Sequence[str], data: Path | None, folder: Path) -> list[Any]:
    """lm-eval's tasks, with documents.

    Args:
        manager: lm-eval's `TaskManager`.
        names: of its tasks.
        data: folder of local documents, or None for the hub's.
        folder: for what local documents need, as long as the tasks are used.

    Raises:
        InputError: lm-eval has no such task, it is no multiple choice, or its documents are missing or of another
            form.
    """
    if unknown := [name for name in names if name not in manager.all_subtasks]:
        raise InputError(f"lm-eval {version('lm-eval')} has no task {unknown[0]!r}: `lm-eval ls tasks` lists them")
    tasks = []
    for name in names:
        spec, place, remedy = name, "the hub", "give local files with --data"
        if data:
            file = _file(data, name)
            place, remedy = str(file), "it needs the columns of the hub's set"
            spec = str(folder / f"{name}.yaml")
            config = local_config(manager.task_index[name].yaml_path, file, folder / "copies")
            Path(spec).write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        try:
            tasks += manager.load([spec])["tasks"].values()
        except Exception as error:  # of `datasets`, of the hub, of templates: almost anything
            raise InputError(f"{place} has no documents of {name} ({one_line(error)}): {remedy}") from error
        if tasks[-1].OUTPUT_TYPE != "multiple_choice":
            raise InputError(
                f"{name} is no multiple choice but {tasks[-1].OUTPUT_TYPE}: leave it to lm-eval's command"
            )
    return tasks


def local_config(task: Path, file: Path, cache: Path) -> dict[str, Any]:
    """lm-eval's task with the documents of a file: its own definition is included, the places are overridden.

    Args:
        task: lm-eval's YAML.
        file: documents with the columns of the task's own data set, JSON lines, Parquet or Arrow.
        cache: folder in which `datasets` keeps its copy.
    """
    files = {"data_files": {"test": str(file.resolve())}, "cache_dir": str(cache)}
    return {
        "include": str(task),
        "dataset_path": FORMATS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": files,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }


def _file(data: Path, name: str) -> Path:
    """The file of a task in a folder."""
    found = [path for ending in FORMATS if (path := data / f"{name}{ending}").is_file()]
    if len(found) != 1:
        wanted = ", ".join(f"{name}{ending}" for ending in FORMATS)
        have = "none" if not found else f"{len(found)}"
        raise InputError(f"{data} has {have} of {wanted}: put one of them there (examples/language_sets.py does)")
    return found[0]


@contextmanager
def _cut_requests() -> Iterator[list[int]]:
    """Counts the sequences that are longer than the model's context, of which lm-eval warns one by one."""
    count = [0]
    logger = logging.getLogger("lm_eval.models.huggingface")

    def keep(entry: logging.LogRecord) -> bool:
        is_cut = "exceeds model's maximum length" in entry.getMessage()
        count[0] += is_cut
        return not is_cut

    logger.addFilter(keep)
    try:
        yield count
    finally:
        logger.removeFilter(keep)


def _numbers(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Number]:
    numbers = {}
    for task, values in found.items():
        for metric in METRICS:
            if (value := values.get(f"{metric},none")) is None:
                continue
            stderr = values[f"{metric}_stderr,none"]
            if isinstance(stderr, float):
                low, high = max(0.0, value - 1.96 * stderr), min(1.0, value + 1.96 * stderr)
                numbers[f"{task}_{metric}"] = Number(value, low, high, stderr)
            else:  # of one document
                numbers[f"{task}_{metric}"] = Number(value)
    return numbers


def _place(config: Mapping[str, Any]) -> str:
    """Where a task's documents are from: a file's name, or the hub's data set and split."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        return Path(files["test"]).name
    names = [
        config["dataset_path"],
        config.get("dataset_name"),
        config.get("test_split") or config["validation_split"],
    ]
    return ":".join(filter(None, names))


def _hash(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Of all prompts, choices and answers in their order: equal whichever way the documents came."""
    digest = hashlib.sha256()
    for task, rows in samples.items():
        for row in rows:
            digest.update(json.dumps([task, row["arguments"], row["target"]]).encode())
    return digest.hexdigest()[:16]


def _weights(model: str) -> str:
    """A checksum of a folder's weights; of the hub's models the name says it."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256("".join(checksum(file) for file in files).encode())
    return digest.hexdigest()[:16] if files else model
