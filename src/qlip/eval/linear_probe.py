"""Linear probe: a linear classifier on frozen features, by the paper's schedule (docs/paper.md section 5).

Features are taken before the quantizer, from the last layer as it stands: CLS, the mean of the patches, or both
side by side. Each is brought to mean 0 and the same standard deviation over the training pictures, such that a
picture's D features have length 1 in the mean: the paper's learning rate presumes a scale that it does not name
[I], and at standard deviation 1 it is too large.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlip.errors import one_line
from qlip.eval.batches import Batch, Columns, collect
from qlip.eval.labels import label_of
from qlip.eval.options import ProbeConfig
from qlip.files import save_tensors, whole_file
from qlip.guarded import parse_json
from qlip.model.qlip import QLIP

POSITIONS = ("cls", "patches", "both")
logger = logging.getLogger("qlip")


def embed(model: QLIP, batches: Iterable[Batch]) -> Columns:
    """The features of labelled pictures.

    Returns:
        cls (n, D), patches (n, D), float32; label (n,) int64.
    """

    def score(batch: Batch) -> dict[str, Tensor]:
        hidden = model.hidden_states(batch.pixel_values(model.need_image_processor()).to(model.device)).float()
        labels = torch.tensor([label_of(sample) for sample in batch.samples])
        return {"cls": hidden[:, 0], "patches": hidden[:, 1:].mean(1), "label": labels}

    return collect(batches, score)


def take(features: Columns, position: str) -> Tensor:
    """Those of a position, one of `POSITIONS`."""
    if position == "both":
        return torch.cat([features["cls"], features["patches"]], 1)
    return features[position]


def train_probe(
    features: Tensor, labels: Tensor, num_classes: int, config: ProbeConfig, device: torch.device | str = "cpu"
) -> nn.Linear:
    """Train the classifier.

    Args:
        features: (n, D) float32, of length about 1.
        labels: (n,) int64.
        num_classes: how many.
        config: the schedule.
        device: where to train.

    Returns:
        the classifier, which starts from zero.
    """
    generator = torch.Generator().manual_seed(config.seed)
    probe = nn.Linear(features.shape[1], num_classes, device=device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    steps = math.ceil(len(features) / config.batch_size)
    step = 0
    for _ in range(config.epochs):
        for rows in torch.randperm(len(features), generator=generator).split(config.batch_size):
            optimizer.param_groups[0]["lr"] = config.lr * factor(
                step, config.warmup_epochs * steps, (config.epochs - config.warmup_epochs) * steps
            )
            loss = F.cross_entropy(probe(features[rows].to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return probe.requires_grad_(False)


def factor(step: int, warmup: int, decay: int) -> float:
    """Share of the peak rate at a step, from 0: a line up to 1 over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / decay)) / 2


def probe_accuracy(
    train: Columns, test: Columns, num_classes: int, config: ProbeConfig, device: torch.device
) -> dict[str, Tensor]:
    """Train a probe of each position and test it.

    Returns:
        cls_top1, patches_top1, both_top1: (n,) whether a test picture is named right.
    """
    found = {}
    for position in POSITIONS:
        features = take(train, position)
        mean, scale = features.mean(0), features.std(0).clamp(min=1e-6) * features.shape[1] ** 0.5
        probe = train_probe((features - mean) / scale, train["label"], num_classes, config, device)
        parts = ((take(test, position) - mean) / scale).split(config.batch_size)
        guesses = torch.cat([probe(part.to(device)).argmax(1).cpu() for part in parts])
        found[f"{position}_top1"] = (guesses == test["label"]).double()
    return found


def cache_file(folder: Path, about: dict[str, Any]) -> Path:
    """Where the features of some pictures are kept: named by what makes them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return folder / f"features-{digest[:16]}.safetensors"


def read_cache(path: Path, about: dict[str, Any]) -> Columns | None:
    """Features that were kept, if they are there and of the same; else None."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if parse_json(file.metadata()["about"]) == about:
                logger.info("features of %s", path)
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
                return Columns(values, values.pop("digests"), [])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s) and is written anew", path, one_line(error))
    return None


def write_cache(path: Path, about: dict[str, Any], features: Columns) -> None:
    """Keep features; those of a data set with faults are not kept, so that the faults are told each time."""
    if not features.faults:
        with whole_file(path) as unfinished:
            save_tensors(
                {**features.values, "digests": features.digests}, unfinished, {"about": json.dumps(about)}
            )


def describe(config: ProbeConfig) -> dict[str, Any]:
    """The schedule, for the record."""
    return {"optimizer": "AdamW (0.9, 0.999)", **asdict(config), "features": "last layer, standardised / √D"}
