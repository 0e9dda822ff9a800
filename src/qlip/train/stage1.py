"""Stage 1: alignment and reconstruction together.

α_r·MSE + α_q·L_BSQ + α_a·InfoNCE + α_z·‖sg(Ẑ) − Z‖²  (docs/paper.md section 2, eq. 3)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlip.errors import InputError
from qlip.model.qlip import QLIP
from qlip.model.quantizer import quantizer_loss
from qlip.train.losses import commitment_loss, contrastive_loss, pixel_mse

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Stage1Config:
    """Weights and optimizer of stage 1.

    Attributes:
        reconstruction_weight: α_r, of the MSE in [0,1] pixels.
        alignment_weight: α_a, of the contrastive loss.
        quantizer_weight: α_q, of the BSQ loss.
        commitment_weight: α_z.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: on matrices; vectors and scalars have none.
        grad_clip: largest norm of the gradient.
    """

    reconstruction_weight: float = 1e3
    alignment_weight: float = 1.0
    quantizer_weight: float = 1.0
    commitment_weight: float = 1.0
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    grad_clip: float = 5.0


class Stage1:
    """The task: owns the model, its losses and its optimizer."""

    def __init__(self, model: QLIP, config: Stage1Config, pixel_std: Tensor):
        """Prepare the optimizer.

        Args:
            model: on its device, in float32; steps run under bfloat16 autocast.
            config: weights and optimizer.
            pixel_std: (3,), what brings normalised pixels to [0,1] differences.

        Raises:
            InputError: a commitment between encoder and decoder of different widths.
        """
        widths = model.config.vision.hidden_size, model.config.hidden_size_post_q
        if config.commitment_weight and widths[0] != widths[1]:
            raise InputError(f"commitment compares latents of widths {widths}: set commitment_weight to 0")
        self.model, self.config = model, config
        self.pixel_std = pixel_std.to(model.device)
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            batch: pixel_values, input_ids, attention_mask, group; see `qlip.data.loader.batches`.

        Returns:
            Every loss term unweighted, their weighted sum `loss`, and diagnostics, as detached scalars.
        """
        losses, metrics = self.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        values = losses | metrics | {"grad_norm": grad_norm, "logit_scale": self.model.logit_scale}
        return {name: value.detach() for name, value in values.items()}

    def losses(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss terms with gradient, and diagnostics of the codes."""
        config, device = self.config, self.model.device
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        input_ids = batch["input_ids"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            out = self.model(pixel_values, input_ids)
        terms = {
            "reconstruction": pixel_mse(out.reconstructions, pixel_values, self.pixel_std),
            "alignment": contrastive_loss(out.logits_per_image, batch["group"].to(device)),
            "quantizer": quantizer_loss(out.latents, self.model.config.quantizer),
        }
        if config.commitment_weight:
            terms["commitment"] = commitment_loss(out.features, out.quantized_features)
        loss = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
        with torch.no_grad():
            mean_bit = (out.codes > 0).float().mean((0, 1))
            bit_entropy = torch.special.entr(torch.stack((mean_bit, 1 - mean_bit))).sum() / math.log(2)
        return terms | {"loss": loss}, {"bit_entropy": bit_entropy}
