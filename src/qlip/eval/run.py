"""The protocols as commands: open model and data on every process, look, put together, write.

open ─ Pictures, this rank's batches ─ a protocol ─ Columns ─ all ranks' ─ numbers with intervals ─ results.json
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlip.data.samples import Joined
from qlip.data.sources import open_indexed
from qlip.errors import InputError
from qlip.eval.batches import (
    Columns,
    Pictures,
    Track,
    data_hash,
    gather,
    gather_objects,
)
from qlip.eval.compare import draw_rates, measure_formats, measure_tokenizer
from qlip.eval.features import load_features
from qlip.eval.frechet import Statistics, frechet_distance
from qlip.eval.interval import Number, mean_of
from qlip.eval.labels import IMAGENET, PLAIN_TEMPLATES, Classes, find_classes, imagenet_templates
from qlip.eval.linear_probe import (
    POSITIONS,
    cache_file,
    describe,
    embed,
    probe_accuracy,
    read_cache,
    write_cache,
)
from qlip.eval.options import FeatureName, Options, PerceptualName, ProbeConfig
from qlip.eval.reconstruction import Distance, Pair, code_use, rate, rebuild
from qlip.eval.results import record, update_card, write_results
from qlip.eval.retrieval import embed_pairs, recalls
from qlip.eval.zero_shot import classify
from qlip.model.checkpoint import load
from qlip.model.qlip import QLIP
from qlip.precision import warn_if_slow
from qlip.train.distributed import on_all_ranks, on_first_rank, processes, rank
from qlip.train.perceptual import load_perceptual

logger = logging.getLogger("qlip")

FORMATS_AT_ONCE = 8  # images whose files are encoded between two steps of the progress bar

Tracker = Callable[[str], Track]
Record = dict[str, Any]


@dataclass
class Evaluation:
    """One evaluation, on this process among all.

    Attributes:
        protocol: its name.
        options: of all protocols.
        device: of this process.
        tracker: shows progress.
        models: those that were loaded, for the record.
        data: for the record.
    """

    protocol: str
    options: Options
    device: torch.device
    tracker: Tracker
    models: list[Record] = field(default_factory=list)
    data: Record = field(default_factory=dict)

    def load(self, name: str) -> QLIP:
        """A tokenizer, which the record will name."""
        dtype = getattr(torch, self.options.dtype)
        warn_if_slow(self.device, dtype)
        model = load(name, device=self.device, dtype=dtype, image_size=self.options.image_size)
        model.need_image_processor()
        self.models.append({"name": model.name, "id_hash": model.id_hash(), "dtype": self.options.dtype})
        return model

    def pictures(self, samples: Joined, model: QLIP) -> Pictures:
        """The pictures of a data set in a model's size."""
        processor, options = model.need_image_processor(), self.options
        return Pictures(samples, processor, options.resize, options.max_samples, options.batch_size)

    def look(self, pictures: Pictures, protocol: Callable[..., Any], what: str) -> Any:
        """Let every rank look at its share: `protocol` is given the batches."""
        batches = pictures.batches(pictures.my_share(), self.options.num_workers)
        track = self.tracker(what) if rank() == 0 else iter
        return on_all_ranks(lambda: protocol(track(batches)))

    def note(self, sources: Sequence[str], samples: Joined, columns: Columns, name: str = "") -> None:
        """Say in the record which data it was."""
        failed = [f"{fault.key}: {fault.reason}" for fault in (*samples.unreadable, *columns.faults)]
        self.data |= {
            f"{name}sources": [Path(source).name for source in sources],
            f"{name}num_samples": len(columns),
            f"{name}hash": columns.data_hash(),
            f"{name}failed": failed,
        }

    def finish(self, results: dict[str, dict[str, Number]], settings: Record, model: str | None) -> Record:
        """Write `results.json` and, if asked, the model card; give the record."""
        found = record(self.protocol, self.models, self.data, settings, results, str(self.device))

        def write() -> None:
            write_results(self.folder(), found)
            if self.options.card and model:
                update_card(Path(model), found)

        on_first_rank(write)
        return found | {"folder": str(self.folder())}

    def folder(self) -> Path:
        """Where results go."""
        if self.protocol == "compare":
            return self.options.out or Path("results/compare")
        return self.options.out or Path("results", self.models[0]["name"].split("/")[-1], self.protocol)


def check_card(options: Options, model: str | None) -> None:
    """Whether there is a folder for the card, if one is to be written.

    Raises:
        InputError: there is none.
    """
    if options.card and not (model and Path(model).is_dir()):
        raise InputError(f"--card writes into a model's folder, and {model!r} is none: name the folder")


@contextmanager
def started(protocol: str, options: Options, tracker: Tracker, model: str | None = None) -> Iterator[Evaluation]:
    """Join the other processes; an evaluation ends with `Evaluation.finish`.

    Raises:
        InputError: the numbers cannot go into the card of `model`.
    """
    check_card(options, model)
    with processes(options.device) as device:
        yield Evaluation(protocol, options, device, tracker)


def evaluate_zero_shot(
    model: str,
    sources: Sequence[str],
    options: Options,
    tracker: Tracker,
    classes: str | None = None,
    templates: Sequence[str] = (),
) -> Record:
    """Zero-shot classification; see `qlip.eval.zero_shot`.

    Args:
        model: as `qlip.load` takes it.
        sources: of labelled pictures.
        options: of all protocols.
        tracker: shows progress.
        classes: as `find_classes` takes it.
        templates: sentences with `{}`, or "imagenet" for CLIP's 80; by default these for ImageNet's classes, and
            "a photo of a {}." for others.

    Returns:
        what stands in results.json.
    """
    with started("zero-shot", options, tracker, model) as run:

        def prepare() -> tuple[QLIP, Joined, Classes, list[str]]:
            samples = open_indexed(sources)
            found = find_classes(classes, samples.class_names)
            asked = list(templates or ((IMAGENET,) if classes == IMAGENET else PLAIN_TEMPLATES))
            loaded = run.load(model)
            loaded.need_text_tokenizer()
            return loaded, samples, found, imagenet_templates() if asked == [IMAGENET] else asked

        tokenizer, samples, found, sentences = on_all_ranks(prepare)
        pictures = run.pictures(samples, tokenizer)

        def look(batches: Any) -> Columns:
            return classify(tokenizer, batches, found.names, sentences, found.index)

        columns = gather(run.look(pictures, look, "classifying"))
        run.note(sources, samples, columns)
        settings = pictures.describe() | {
            "classes": found.source,
            "num_classes": len(found.names),
            "templates": sentences if len(sentences) < 10 else f"{len(sentences)} of CLIP",
        }
        results = {name: mean_of(columns[name]) for name in ("top1", "top5")}
        return run.finish({tokenizer.name: results}, settings, model)


def evaluate_retrieval(
    model: str, sources: Sequence[str], options: Options, tracker: Tracker, most_captions: int = 5
) -> Record:
    """Retrieval of pictures by captions and back; see `qlip.eval.retrieval`."""
    if most_captions < 1:
        raise InputError(f"most_captions is {most_captions}: use 1 or more")
    with started("retrieval", options, tracker, model) as run:
        tokenizer, samples = on_all_ranks(lambda: (run.load(model), open_indexed(sources)))
        pictures = run.pictures(samples, tokenizer)
        look = partial(embed_pairs, tokenizer, most_captions=most_captions)
        columns = gather(run.look(pictures, look, "embedding"))
        run.note(sources, samples, columns)
        counts = columns["num_captions"]
        results = recalls(columns["image_embeds"], columns["text_embeds"], counts)
        settings = pictures.describe() | {"most_captions": most_captions, "num_captions": int(counts.sum())}
        return run.finish({tokenizer.name: results}, settings, model)


def evaluate_reconstruction(
    model: str,
    sources: Sequence[str],
    options: Options,
    tracker: Tracker,
    features: Sequence[FeatureName] = ("auto",),
    inception_weights: Path | None = None,
    perceptual: PerceptualName = "auto",
) -> Record:
    """Reconstruction; see `qlip.eval.reconstruction`."""
    with started("reconstruction", options, tracker, model) as run:

        def prepare() -> tuple[QLIP, Joined, list[Any], dict[str, Distance]]:
            networks = load_features(features, run.device, inception_weights)
            return run.load(model), open_indexed(sources), networks, _distances(perceptual, run.device)

        tokenizer, samples, networks, distances = on_all_ranks(prepare)
        pictures = run.pictures(samples, tokenizer)
        look = partial(rebuild, tokenizer, distances=distances, features=networks)
        columns, pairs = run.look(pictures, look, "rebuilding")
        columns, pairs = gather(columns), _merge(gather_objects(pairs))
        run.note(sources, samples, columns)
        results = {name: mean_of(columns[name]) for name in ("psnr", "ssim", *distances)}
        results |= {name.replace("fid", "rfid"): distance_of(name, *pair) for name, pair in pairs.items()}
        use = code_use(columns["tokens"], tokenizer.config.num_bits)
        used = use["distinct_tokens"] * columns["tokens"].numel() / 2**tokenizer.config.num_bits
        totals = rate(tokenizer.config) | use | {"codes_used": used}
        results |= {name: Number(value) for name, value in totals.items()}
        settings = pictures.describe() | {"compared": "8-bit RGB", "features": [n.name for n in networks]}
        return run.finish({tokenizer.name: results}, settings, model)


def evaluate_linear_probe(
    model: str,
    train: Sequence[str],
    test: Sequence[str],
    options: Options,
    tracker: Tracker,
    config: ProbeConfig,
    cache: Path | None = None,
) -> Record:
    """Linear probe; see `qlip.eval.linear_probe`.

    Args:
        model: as `qlip.load` takes it.
        train: sources of labelled pictures.
        test: the same, held out; of the same classes.
        options: of all protocols.
        tracker: shows progress.
        config: the schedule.
        cache: folder in which features are kept; by default the one of the results.

    Returns:
        what stands in results.json.
    """
    with started("linear-probe", options, tracker, model) as run:
        opened = on_all_ranks(lambda: (run.load(model), open_indexed(train), open_indexed(test)))
        tokenizer, train_samples, test_samples = opened
        names, held_out = train_samples.class_names, test_samples.class_names
        if names != held_out:
            raise InputError("train and test name their classes differently: give both the same class folders")
        folder = cache or run.folder()
        found = {}
        for name, sources, samples in (("train_", train, train_samples), ("", test, test_samples)):
            pictures = run.pictures(samples, tokenizer)
            found[name] = _features(run, tokenizer, pictures, folder, f"features, {name or 'test_'}".rstrip("_"))
            run.note(sources, samples, found[name], name)
        num_classes = len(names) or 1 + max(int(columns["label"].max()) for columns in found.values())
        columns = probe_accuracy(found["train_"], found[""], num_classes, config, run.device)
        results = {name: mean_of(hits) for name, hits in columns.items()}
        settings = pictures.describe() | describe(config) | {"num_classes": num_classes, "positions": POSITIONS}
        return run.finish({tokenizer.name: results}, settings, model)


def evaluate_compare(
    models: Sequence[str],
    sources: Sequence[str],
    options: Options,
    tracker: Tracker,
    perceptual: PerceptualName = "auto",
) -> Record:
    """Tokenizers and file formats side by side on the same pictures; see `qlip.eval.compare`."""
    with started("compare", options, tracker) as run:

        def prepare() -> tuple[list[QLIP], Joined, dict[str, Distance]]:
            loaded = [run.load(name) for name in models]
            sizes = {model.config.size for model in loaded}
            if len(sizes) > 1:
                raise InputError(f"the tokenizers work at {sorted(sizes)}: give one --image-size for all")
            if len({model.name for model in loaded}) < len(loaded):
                raise InputError(f"two of {', '.join(models)} have one name: rename a folder")
            return loaded, open_indexed(sources), _distances(perceptual, run.device)

        tokenizers, samples, distances = on_all_ranks(prepare)
        results: dict[str, dict[str, Number]] = {}
        for tokenizer in tokenizers:
            pictures = run.pictures(samples, tokenizer)
            look = partial(measure_tokenizer, tokenizer, distances=distances)
            columns = gather(run.look(pictures, look, tokenizer.name))
            results[tokenizer.name] = {name: mean_of(rows) for name, rows in columns.values.items()}
            results[tokenizer.name] |= {name: Number(value) for name, value in rate(tokenizer.config).items()}
        targets = sorted({-(-t.config.num_tokens * t.config.num_bits // 8) for t in tokenizers})
        look = partial(measure_formats, targets=targets, distances=distances, device=run.device)
        few = replace(run.pictures(samples, tokenizers[0]), batch_size=FORMATS_AT_ONCE)  # of which progress shows
        columns = gather(run.look(few, look, "file formats"))
        run.note(sources, samples, columns)
        for name, rows in columns.values.items():
            who, _, metric = name.rpartition("/")
            results.setdefault(who, {})[metric] = mean_of(rows)
        settings = pictures.describe() | {"matched_bytes": targets, "size": list(tokenizers[0].config.size)}
        found = run.finish(results, settings, None)
        on_first_rank(lambda: draw_rates(found, run.folder() / "compare.png"))
        return found


def _features(run: Evaluation, model: QLIP, pictures: Pictures, folder: Path, what: str) -> Columns:
    """Features of all pictures, kept in a file; every rank has them all."""
    digests = on_all_ranks(lambda: pictures.digests(pictures.my_share()))
    about = run.models[0] | pictures.describe() | {"data": data_hash(torch.cat(gather_objects(digests)))}
    path = cache_file(folder, about)
    columns = on_all_ranks(lambda: read_cache(path, about))
    if columns is None:
        columns = gather(run.look(pictures, partial(embed, model), what))
        on_first_rank(partial(write_cache, path, about, columns))
    return columns


def _distances(name: PerceptualName, device: torch.device) -> dict[str, Distance]:
    """The perceptual distance by its name, "lpips" or "st_lpips"."""
    if name == "none":
        return {}
    try:
        distance = load_perceptual(name)
    except InputError as error:
        if name != "auto":
            raise
        logger.info("no perceptual distance: %s", error)
        return {}
    return {"st_lpips" if distance.shift_tolerant else "lpips": distance.to(device)}


def _merge(parts: list[dict[str, Pair]]) -> dict[str, Pair]:
    merged = dict(parts[0])
    for part in parts[1:]:
        for name, (original, rebuilt) in part.items():
            merged[name] = (merged[name][0].merge(original), merged[name][1].merge(rebuilt))
    return merged


def distance_of(name: str, reference: Statistics, pictures: Statistics) -> Number:
    """A Fréchet distance; the log says so if there are too few pictures for it."""
    fewest = min(reference.count, pictures.count)
    if fewest <= len(reference.total):
        logger.warning(
            "%s of %s pictures, fewer than its %s features: too high, and not to be compared with that of more",
            name,
            fewest,
            len(reference.total),
        )
    return Number(frechet_distance(reference, pictures))
