"""Recipes of stage 1: which model, from which weights and words."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from qlip.data.teacher import TeacherFiles
from qlip.errors import InputError
from qlip.model.config import PRESETS, QLIPConfig
from qlip.model.image import ImageProcessor
from qlip.model.init import init_from
from qlip.model.qlip import QLIP
from qlip.model.text import TextTokenizer
from qlip.recipes.run import Data, TrainRecipe
from qlip.train.flops import flops_per_image
from qlip.train.stage1 import Stage1, Stage1Config


@dataclass(frozen=True)
class InitConfig:
    """Which weights training begins with; random ones where none are named.

    Attributes:
        vision: safetensors file of the vision encoder.
        vision_source: its layout: "eva-mim" (the paper's choice), "eva-clip" (with its text tower), or "qlip".
        text: safetensors file, or folder with one, of CLIP's text tower as `transformers` lays it out.
    """

    vision: Path | None = None
    vision_source: Literal["eva-mim", "eva-clip", "qlip"] = "eva-mim"
    text: Path | None = None


@dataclass(frozen=True)
class Recipe(TrainRecipe):
    """Everything that makes a run of stage 1.

    Attributes:
        model: the tokenizer to train; its text vocabulary size is an upper bound where one is learnt.
        init: weights to begin with.
        vocabulary: folder with CLIP's vocab.json and merges.txt, or a tokenizer.json; None: learnt from
            the captions.
        teacher: files of `qlip features --vision` with a vision model's features of the training images, which the
            encoder learns to predict. They may hold a part of the images; the others go without.
        task: loss weights and optimizer.
    """

    model: QLIPConfig = field(default_factory=lambda: PRESETS["tiny"])
    init: InitConfig = field(default_factory=InitConfig)
    vocabulary: Path | None = None
    teacher: tuple[Path, ...] = ()
    task: Annotated[Stage1Config, tyro.conf.arg(name="")] = field(default_factory=Stage1Config)

    def __post_init__(self):
        super().__post_init__()
        with_words = self.init.text or (self.init.vision and self.init.vision_source == "eva-clip")
        if with_words and self.vocabulary is None:
            raise InputError("init brings CLIP's text tower: name the vocabulary that it reads with --vocabulary")
        if self.teacher and self.data.buckets:
            raise InputError("a teacher and buckets do not go together: leave one of them out")

    @property
    def stage(self) -> int:
        """1."""
        return 1

    def build_model(self, data: Data, device: torch.device, description: Path | None) -> QLIP:
        """A model from random or given weights, with its image processor and vocabulary."""
        size = self.model.vision.image_size
        processor = ImageProcessor(resize=size, crop=size).at_size(self.model.size)
        vocabulary = self._vocabulary(data, description)
        text = replace(
            self.model.text,
            vocab_size=vocabulary.vocab_size,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
        torch.manual_seed(self.seed)
        model = QLIP(
            replace(self.model, text=text),
            image_processor=processor,
            text_tokenizer=vocabulary,
        )
        logger = logging.getLogger("qlip")
        if self.init.vision:
            report = init_from(model, self.init.vision, self.init.vision_source)
            logger.info("weights of %s: %s", self.init.vision, report)
        if self.init.text:
            logger.info("weights of %s: %s", self.init.text, init_from(model, self.init.text, "clip-text"))
        return model.to(device)

    def build_task(self, model: QLIP) -> Stage1:
        """Stage 1."""
        files = self.open_teacher()
        return Stage1(model, self.task, self, self.batch_size, files.teacher if files is not None else None)

    def open_teacher(self) -> TeacherFiles | None:
        """The files that `teacher` names, unless their loss has no weight."""
        return TeacherFiles(self.teacher) if self.teacher and self.task.teacher_weight else None

    def flops_per_image(self, model: QLIP, text_length: int) -> float:
        """Of the towers that the recipe trains."""
        aligned, rebuilt = bool(self.task.alignment_weight), bool(self.task.reconstruction_weight)
        share = rebuilt / self.task.reconstruct_every
        return flops_per_image(model.config, text_length * aligned, share, self.task.drop_tokens)

    def _vocabulary(self, data: Data, description: Path | None) -> TextTokenizer:
        """Given, else that of the run that goes on, else learnt."""
        context, folder = self.model.text.max_position_embeddings, self.vocabulary or description
        if folder is None:
            return TextTokenizer.train(_captions(data), self.model.text.vocab_size, context)
        found = TextTokenizer.find(folder, context)
        if found is None:
            raise InputError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
        return found


def _captions(data: Data) -> Iterator[str]:
    """All captions of the samples, and all that class names and templates can say."""
    yield from data.train.captions()
    yield from chain.from_iterable(data.captioner.sentences)
