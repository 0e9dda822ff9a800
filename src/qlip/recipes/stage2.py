"""Recipes of stage 2: better pictures from the tokens of a tokenizer that stage 1 left."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from qlip.errors import InputError
from qlip.model.checkpoint import load
from qlip.model.qlip import QLIP
from qlip.recipes.run import Data, TrainRecipe
from qlip.train.flops import flops_per_image
from qlip.train.stage2 import Stage2, Stage2Config


@dataclass(frozen=True)
class Stage2Recipe(TrainRecipe):
    """Everything that makes a run of stage 2.

    Attributes:
        tokenizer: what stage 1 left: a folder such as runs/mine/model, a bundled name, or a hub id.
        task: loss weights and optimizers.
    """

    tokenizer: str = ""
    task: Annotated[Stage2Config, tyro.conf.arg(name="")] = field(default_factory=Stage2Config)

    def __post_init__(self):
        super().__post_init__()
        if self.data.buckets and self.task.adversarial_weight and self.task.adversary == "stylegan2":
            raise InputError("adversary 'stylegan2' takes pictures of one size: with buckets take 'patchgan'")

    @property
    def stage(self) -> int:
        """2."""
        return 2

    def build_model(self, data: Data, device: torch.device, description: Path | None) -> QLIP:
        """The tokenizer of stage 1."""
        if not self.tokenizer:
            raise InputError(
                "stage 2 needs a tokenizer of stage 1: name it with --tokenizer, e.g. runs/mine/model"
            )
        model = load(self.tokenizer, device=device).train()
        torch.manual_seed(self.seed)  # of the discriminator
        return model

    def build_task(self, model: QLIP) -> Stage2:
        """Stage 2."""
        return Stage2(model, self.task, self, self.batch_size)

    def flops_per_image(self, model: QLIP, text_length: int) -> float:
        """Of the tokenizer; discriminator and perceptual loss come on top."""
        return flops_per_image(model.config, frozen_encoder=True)
