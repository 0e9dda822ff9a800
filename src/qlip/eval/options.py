"""What a person may choose of an evaluation; importing it is cheap, for the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlip.errors import InputError

Resize = Literal["crop", "squash"]  # as in qlip.model.image, which imports torch
FeatureName = Literal["auto", "inception", "efficientnet-lite0", "none"]
PerceptualName = Literal["auto", "lpips", "st-lpips", "none"]

LANGUAGE_TASKS = (
    "arc_challenge",
    "hellaswag",
    "piqa",
    "social_iqa",
    "winogrande",
)  # the paper's, as lm-eval has them


@dataclass(frozen=True)
class LanguageOptions:
    """How a language model is measured.

    Attributes:
        tasks: names of lm-eval's tasks, apart or with commas between them; by default the paper's five.
        data: folder of TASK.jsonl, TASK.parquet or TASK.arrow; by default the documents are those of the hub that
            lm-eval names.
        limit: only so many documents of a task, the first; by default all.
        batch_size: sequences at once.
        device: where to compute; auto takes a GPU if there is one.
        dtype: of the weights.
        out: folder for results.json; by default results/MODEL/um3-text.
    """

    tasks: tuple[str, ...] = LANGUAGE_TASKS
    data: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: use 1 or more")
        if len(set(self.task_names)) < len(self.task_names) or not all(self.task_names):
            raise InputError(f"tasks is {','.join(self.tasks)!r}: name each task once")

    @property
    def task_names(self) -> list[str]:
        """The tasks, one by one."""
        return [name for names in self.tasks for name in names.split(",")]


@dataclass(frozen=True)
class Options:
    """What all protocols share.

    Attributes:
        out: folder for results.json; by default results/MODEL/PROTOCOL.
        card: write the numbers into the README.md of the model, which must be a folder, too.
        resize: crop: the short side to the model's length, then the middle, as ImageNet is evaluated; squash: the
            whole picture to the model's size, whatever its aspect.
        image_size: side, or height and width, to work at; by default the model's own.
        max_samples: how many pictures to look at, evenly spread; by default all.
        batch_size: pictures at once.
        num_workers: processes that decode, for each process that computes.
        device: where to compute; auto takes a GPU if there is one.
        dtype: of the weights.
    """

    out: Path | None = None
    card: bool = False
    resize: Resize = "crop"
    image_size: int | tuple[int, int] | None = None
    max_samples: int | None = None
    batch_size: int = 64
    num_workers: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("max_samples", "batch_size", "num_workers"):
            value, least = getattr(self, name), int(name != "num_workers")
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: use {least} or more")


@dataclass(frozen=True)
class ProbeConfig:
    """The paper's schedule of the linear probe.

    Attributes:
        lr: of AdamW (0.9, 0.999), at its peak.
        weight_decay: of AdamW.
        warmup_epochs: the first of the epochs, in which the rate rises linearly from 0; then a cosine to 0.
        epochs: all of them, with the warm-up's.
        batch_size: pictures a step.
        seed: of the order.
    """

    lr: float = 0.2
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    epochs: int = 10
    batch_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}: use a number above 0")
        for name in ("weight_decay", "warmup_epochs", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: use 0 or more")
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        num: pictures after each sample's words.
        seed: of the first picture; each further one has one more.
        cfg: how strongly the words count, from 1; by default, as of the next three, what the model takes itself.
        temperature: below 1 more of the likely, above 1 more of the rest.
        top_k: only so many of the likeliest sub-tokens; 0: all.
        top_p: only the likeliest sub-tokens that together have this share.
    """

    num: int = 1
    seed: int = 0
    cfg: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.num < 1 or self.seed < 0:
            raise InputError(f"num is {self.num} and seed {self.seed}: use 1 and 0, or more")


@dataclass(frozen=True)
class Scoring:
    """What drawn pictures are compared with.

    Attributes:
        reference: sources of the photographs that a Fréchet distance compares with; by default those whose words
            are drawn after.
        classes: "imagenet" for its 1,000 names, or a JSON file of class names; by default the data's own.
        template: a sentence with {} for the class, to draw after; by default the data's captions, and
            "a photo of a {}." where it has none.
        features: networks for Fréchet distances; auto takes those whose weights are here.
        inception_weights: file of FID's Inception; by default torch.hub's folder has it.
        clip: folder or hub id of a CLIP for CLIPScore, such as openai/clip-vit-base-patch32.
        qlip: a QLIP by whose own towers pictures and words are compared: the QLIP score.
        classifier: whether a drawn picture shows its class.
    """

    reference: tuple[str, ...] = ()
    classes: str | None = None
    template: str | None = None
    features: tuple[FeatureName, ...] = ("auto",)
    inception_weights: Path | None = None
    clip: str | None = None
    qlip: str | None = None
    classifier: Literal["efficientnet-lite0", "none"] = "efficientnet-lite0"

    def __post_init__(self) -> None:
        if self.template is not None and "{}" not in self.template:
            raise InputError(f"template {self.template!r} has no {{}}: put it where the class goes")
