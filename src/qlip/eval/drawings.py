"""How good drawn pictures are: a Fréchet distance to photographs, how well they fit their words, and whether a
classifier that knows nothing of QLIP sees what was asked for.

Whoever drew them: what is measured are pictures of any source, with the captions or labels that they were drawn
after. The same is measured of the reference, and of what the tokenizer makes of the reference, which no drawing of
its tokens can be expected to surpass.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.data.samples import Fault, Joined, Samples, readable
from qlip.data.sources import open_indexed
from qlip.errors import InputError
from qlip.eval.batches import Batch, Columns, Pictures, collect, gather, gather_objects, with_captions
from qlip.eval.clip_score import ClipMatcher, Matcher, QlipMatcher
from qlip.eval.efficientnet import EfficientNetLite0, load_efficientnet
from qlip.eval.features import Features, load_features
from qlip.eval.frechet import Statistics
from qlip.eval.interval import Number, mean_of
from qlip.eval.labels import PLAIN_TEMPLATES, Classes, find_classes, imagenet_outputs
from qlip.eval.options import Options, Scoring
from qlip.eval.reconstruction import through_tokens
from qlip.eval.run import Evaluation, Record, Tracker, distance_of, started
from qlip.model.checkpoint import load
from qlip.model.image import ImageProcessor, read_image
from qlip.model.qlip import QLIP
from qlip.train.distributed import on_all_ranks

REFERENCE = "the reference"
logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class Words:
    """What a sample's picture is drawn after, or should show.

    Attributes:
        classes: what labels mean.
        template: a sentence with `{}` for the class that goes before captions; None: captions, and of samples that
            have none "a photo of a {}.".
    """

    classes: Classes | None
    template: str | None = None

    def __call__(self, sample: dict[str, Any]) -> str:
        """Its words: the first caption, or the sentence with the usual name of its class.

        Raises:
            InputError: it has none.
        """
        captions = with_captions(sample)
        if captions and self.template is None:
            return captions[0]
        if self.classes is None:
            without = "no caption" if self.template is None else "a --template wants a class"
            raise InputError(f"{sample.get('key')}: {without}, and no names of classes: give --classes")
        name = self.classes.names[self.classes.index(sample)]
        return (self.template or PLAIN_TEMPLATES[0]).replace("{}", name)


@dataclass(frozen=True)
class Judges:
    """What looks at pictures.

    Attributes:
        features: networks for Fréchet distances.
        matchers: compare pictures with words.
        classifier: says what is in a picture; None: not asked.
        outputs: of each class its output.
    """

    features: Sequence[Features] = ()
    matchers: Sequence[Matcher] = ()
    classifier: EfficientNetLite0 | None = None
    outputs: Sequence[int] = ()


@dataclass(frozen=True)
class Drawer:
    """Who drew the pictures, for the record.

    Attributes:
        name: of the model.
        id_hash: of the ids that it draws.
        dtype: of its weights.
        settings: how they were drawn.
    """

    name: str
    id_hash: str = "unknown"
    dtype: str = "unknown"
    settings: Record = field(default_factory=dict)


def judge(
    batches: Iterable[Batch], judges: Judges, words: Words, labels: Callable[[dict[str, Any]], int] | None = None
) -> tuple[Columns, dict[str, Statistics]]:
    """Look at pictures.

    Args:
        batches: pictures.
        judges: who looks.
        words: of each, for the matchers.
        labels: of each the place of its class in the judges' outputs; None: the classifier is not asked.

    Returns:
        clip_score, qlip_score: max(cos, 0); class_accuracy: whether the classifier, limited to the outputs, names
        the right class; statistics by the metric's name.
    """
    statistics = {network.metric: Statistics.empty(network.num_features) for network in judges.features}
    asked = judges.classifier if labels else None

    def score(batch: Batch) -> dict[str, Tensor]:
        seen = {network.name: network(batch.pictures) for network in judges.features}
        for network in judges.features:
            statistics[network.metric].add(seen[network.name])
        rows = {m.metric: m(batch.pictures, [*map(words, batch.samples)]).clamp(min=0) for m in judges.matchers}
        if asked and labels:
            features = seen[asked.name] if asked.name in seen else asked(batch.pictures)
            guesses = asked.logits(features)[:, list(judges.outputs)].argmax(1).cpu()
            rows["class_accuracy"] = guesses == torch.tensor([labels(sample) for sample in batch.samples])
        return rows

    return collect(batches, score), statistics


def evaluate_drawn(
    drawn: Sequence[str],
    sources: Sequence[str],
    options: Options,
    tracker: Tracker,
    scoring: Scoring,
    tokenizer: str | None = None,
    drawer: Drawer | None = None,
    judges: Judges | None = None,
    card: str | None = None,
) -> Record:
    """Measure pictures that somebody drew.

    Args:
        drawn: sources of the pictures, with the captions or labels that they were drawn after.
        sources: the data whose words were drawn after. It numbers the classes, unless `drawn` has class folders,
            and is the reference, unless `scoring` names another.
        options: of all protocols; by default the size is that of the first drawn picture. `max_samples` is of
            the reference.
        tracker: shows progress.
        scoring: what is measured.
        tokenizer: whose reconstructions of the reference are measured, too.
        drawer: who drew them.
        judges: who looks at them; by default those that `scoring` names.
        card: folder of the model whose card is written if the options say so.

    Returns:
        what stands in results.json.

    Raises:
        InputError: something cannot be read, or the classes are not ImageNet's and the classifier is asked.
    """
    with started("t2i", options, tracker, card) as run:

        def prepare() -> tuple[_Set, _Set, Judges, ImageProcessor, QLIP | None]:
            pictures, reference = _open(drawn, sources, scoring)
            looking = judges or open_judges(scoring, pictures.classes or reference.classes, run.device)
            size = _size(options, pictures.samples)
            if tokenizer is None:
                return pictures, reference, looking, ImageProcessor(min(size), size), None
            model = load(tokenizer, device=run.device, image_size=size)
            return pictures, reference, looking, model.need_image_processor(), model

        pictures, reference, looking, processor, model = on_all_ranks(prepare)
        by = drawer or Drawer(Path(drawn[0]).stem)
        run.models.append({"name": by.name, "id_hash": by.id_hash, "dtype": by.dtype})
        settings = processor, options.resize
        photographs = Pictures(reference.samples, *settings, options.max_samples, options.batch_size)
        at_photographs = looking if reference.has_words else replace(looking, matchers=())
        columns, wanted = _look(run, photographs, at_photographs, reference, "photographs")
        run.note(scoring.reference or sources, reference.samples, columns)
        found = {REFERENCE: _numbers(columns)}
        if model:
            columns, pairs = _look(run, photographs, at_photographs, reference, "rebuilding", model)
            distances = {n.replace("fid", "rfid"): distance_of(n, wanted[n], pair) for n, pair in pairs.items()}
            found[f"{REFERENCE}, rebuilt by {model.name}"] = distances | _numbers(columns)
        everything = Pictures(pictures.samples, *settings, None, options.batch_size)
        columns, pairs = _look(run, everything, looking, pictures, "drawn pictures")
        run.note(drawn, pictures.samples, columns, "drawn_")
        distances = {n.replace("fid", "gfid"): distance_of(n, wanted[n], pair) for n, pair in pairs.items()}
        about = photographs.describe() | _describe(looking, scoring) | by.settings
        return run.finish({by.name: distances | _numbers(columns), **found}, about, card)


@dataclass(frozen=True)
class _Set:
    """Pictures, and what is known of them."""

    samples: Joined
    classes: Classes | None
    template: str | None

    @cached_property
    def first(self) -> dict[str, Any]:
        """The first sample that can be read; nothing if none can."""
        samples = readable(self.samples, range(len(self.samples)))
        return next((sample for sample in samples if not isinstance(sample, Fault)), {})

    @property
    def labels(self) -> Callable[[dict[str, Any]], int] | None:
        """Of each sample the place of its class, where they have any."""
        return self.classes.index if self.classes and "label" in self.first else None

    @property
    def has_words(self) -> bool:
        """Whether there is something to compare with pictures."""
        return bool(self.labels or with_captions(self.first))


def _open(drawn: Sequence[str], sources: Sequence[str], scoring: Scoring) -> tuple[_Set, _Set]:
    """The drawn pictures and the reference."""
    data, pictures = open_indexed(sources), open_indexed(drawn)
    reference = open_indexed(scoring.reference) if scoring.reference else data
    of_pictures, of_reference = (classes_of(scoring, samples, data) for samples in (pictures, reference))
    if of_pictures and of_reference and of_pictures.names != of_reference.names:
        raise InputError("the drawn pictures and the reference name their classes differently: give --classes")
    return _Set(pictures, of_pictures, None), _Set(reference, of_reference, scoring.template)


def classes_of(scoring: Scoring, samples: Joined, data: Joined) -> Classes | None:
    """What labels mean: by the samples' own class folders, else as the data numbers them; None: nothing."""
    folders = samples.class_names or data.class_names
    return find_classes(scoring.classes, folders) if scoring.classes or folders else None


def open_judges(scoring: Scoring, classes: Classes | None, device: torch.device) -> Judges:
    """Those who look, as `scoring` names them.

    Args:
        scoring: what is measured.
        classes: what is told apart; None: nothing.
        device: where.

    Raises:
        InputError: weights are missing, or the classes are not ImageNet's and the classifier is asked.
    """
    features = load_features(scoring.features, device, scoring.inception_weights)
    matchers: list[Matcher] = [ClipMatcher(scoring.clip, device)] if scoring.clip else []
    if scoring.qlip:
        matchers.append(QlipMatcher(load(scoring.qlip, device=device)))
    if scoring.classifier == "none" or classes is None:
        logger.info("class accuracy is left out: no %s", "classes" if classes is None else "classifier is asked")
        return Judges(features, matchers)
    outputs = imagenet_outputs(classes)
    loaded = next((network for network in features if isinstance(network, EfficientNetLite0)), None)
    return Judges(features, matchers, loaded or load_efficientnet().to(device), outputs)


def _look(
    run: Evaluation, pictures: Pictures, judges: Judges, of: _Set, what: str, through: QLIP | None = None
) -> tuple[Columns, dict[str, Statistics]]:
    """Judge a set, or what a tokenizer makes of it, on all ranks."""

    def look(batches: Iterable[Batch]) -> tuple[Columns, dict[str, Statistics]]:
        seen = _rebuilt(through, batches) if through else batches
        return judge(seen, judges, Words(of.classes, of.template), of.labels)

    columns, statistics = run.look(pictures, look, what)
    parts = gather_objects(statistics)
    merged = dict(parts[0])
    for part in parts[1:]:
        merged = {name: merged[name].merge(value) for name, value in part.items()}
    return gather(columns), merged


def _rebuilt(model: QLIP, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield replace(batch, pictures=through_tokens(model, batch)[1]) if batch.samples else batch


def _numbers(columns: Columns) -> dict[str, Number]:
    return {name: mean_of(rows) for name, rows in columns.values.items()}


def _size(options: Options, drawn: Samples) -> tuple[int, int]:
    """Height and width at which pictures are compared."""
    if isinstance(options.image_size, int):
        return options.image_size, options.image_size
    if options.image_size:
        return options.image_size
    fault = None
    for sample in readable(drawn, range(len(drawn))):
        if isinstance(sample, Fault):
            fault = sample
            continue
        picture: Image.Image = read_image(sample["image"])
        return picture.height, picture.width
    raise InputError(f"not one of the drawn pictures can be read; the first: {fault and fault.reason}")


def _describe(judges: Judges, scoring: Scoring) -> Record:
    matchers = {matcher.metric: f"{matcher.name}, max(cos, 0), w = 1" for matcher in judges.matchers}
    found: Record = {"features": [network.name for network in judges.features], **matchers}
    if judges.classifier:
        found |= {"classifier": judges.classifier.name, "num_classes": len(judges.outputs)}
    return found | {"template": scoring.template}
