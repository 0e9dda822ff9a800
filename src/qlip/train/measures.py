"""What the evaluations' numbers are: title, unit, and which way is better.

The panel, the log's lines, the plots and `--best` all read this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation.

    Attributes:
        title: what it is called in plots.
        unit: of its values; empty where it has none.
        lower_is_better: whether a smaller value is a better one.
    """

    title: str
    unit: str = ""
    lower_is_better: bool = False

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value beats another one. A NaN never does, and every number beats a NaN."""
        return (value < than if self.lower_is_better else value > than) or (than != than and value == value)


MEASURES: Mapping[str, Measure] = {
    "psnr": Measure("PSNR", "dB"),
    "ssim": Measure("SSIM"),
    "perceptual": Measure("perceptual distance", lower_is_better=True),
    "top1": Measure("top-1"),
    "top5": Measure("top-5"),
    "bit_entropy": Measure("entropy of the bits", "bits"),
    "distinct_tokens": Measure("different tokens (share)"),
    "text_nats_per_token": Measure("text", "nats a token", lower_is_better=True),
    "text_perplexity": Measure("text perplexity", lower_is_better=True),
    "caption_nats_per_token": Measure("captions", "nats a token", lower_is_better=True),
    "bits_per_image*": Measure("bits of an image", "bits", lower_is_better=True),
    "*lpips*": Measure("perceptual distance", lower_is_better=True),
    "*loss": Measure("loss", lower_is_better=True),
    "*mse": Measure("mean squared error", lower_is_better=True),
    "*fid*": Measure("Fréchet distance", lower_is_better=True),
    "fd*": Measure("Fréchet distance", lower_is_better=True),
    "rfd*": Measure("Fréchet distance", lower_is_better=True),
}
"""By name, or by a pattern of names; the first that fits counts."""


def measure(name: str) -> Measure:
    """What an evaluation's number is; of one that is not in the table, higher values are taken as better."""
    return next((found for pattern, found in MEASURES.items() if fnmatchcase(name, pattern)), Measure(name))
