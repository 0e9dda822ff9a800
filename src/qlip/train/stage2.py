"""Stage 2: reconstruction quality. The vision encoder is frozen, the text tower stays behind.

L_mse + L_BSQ + 0.1·L_LPIPS + 0.1·L_GAN  (docs/paper.md section 3, eq. 4)
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlip.errors import InputError
from qlip.model.qlip import QLIP
from qlip.model.quantizer import codebook_term, token_terms
from qlip.train.caching import Part, Terms, backward, split_batch, weighted_sum
from qlip.train.discriminators import PatchDiscriminator, StyleDiscriminator, build_discriminator, r1_penalty
from qlip.train.distributed import average, average_gradients, world_size
from qlip.train.lamb import local_shards
from qlip.train.losses import PixelScale, pixel_mse, pixel_scale
from qlip.train.metrics import code_metrics, code_use
from qlip.train.optim import OptimizerConfig, adamw, build_optimizer, clip_gradients, make_groups, optimizer_state
from qlip.train.parallel import ComputeConfig, Parallel, whole_copy
from qlip.train.perceptual import Variant, load_perceptual
from qlip.train.task import check_finite, prefixed

Discriminator = StyleDiscriminator | PatchDiscriminator


@dataclass(frozen=True)
class Stage2Config(OptimizerConfig):
    """Weights and optimizers of stage 2. `vision_lr`, `text_lr` and `layer_decay` have nothing to act on here.

    Attributes:
        reconstruction_weight: of the MSE.
        quantizer_weight: α_q, of the BSQ loss.
        perceptual_weight: α_p, of LPIPS.
        adversarial_weight: α_g, of the generator's loss.
        pixel_scale: the MSE is of pixels in [0,1] ("unit") or of normalised ones ("normalized"). The paper says
            neither; normalised ones make it some 14 times larger, of the size of 0.1·LPIPS.
        freeze_ids: freeze the quantizer's down MLP too, so that every picture keeps its token ids.
        perceptual: "lpips" (the standard VGG16 weights), "st-lpips" (shift-tolerant, installable), or "auto": the
            first that is there; the log names it.
        adversary: "stylegan2": residual discriminator, non-saturating loss, lazy R1; "patchgan": hinge loss.
        discriminator_width: channels of its widest layer; 512 is the published size.
        discriminator_lr: peak learning rate of its AdamW.
        r1_weight: γ of R1, for "stylegan2"; 0 leaves it out.
        r1_every: steps from one R1 penalty to the next.
        ema: decay of the running mean of the trained weights, which is what is evaluated and exported; 0: none.
    """

    decoder_lr: float | None = 1e-4
    grad_clip: float = 1.0
    reconstruction_weight: float = 1.0
    quantizer_weight: float = 1.0
    perceptual_weight: float = 0.1
    adversarial_weight: float = 0.1
    pixel_scale: PixelScale = "normalized"
    freeze_ids: bool = False
    perceptual: Variant = "auto"
    adversary: Literal["stylegan2", "patchgan"] = "stylegan2"
    discriminator_width: int = 512
    discriminator_lr: float = 1e-4
    r1_weight: float = 10.0
    r1_every: int = 16
    ema: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        if not self.reconstruction_weight and not self.perceptual_weight:
            raise InputError(
                "reconstruction_weight and perceptual_weight are both 0: nothing tells what to rebuild"
            )
        if self.vision_lr is not None or self.text_lr is not None or self.layer_decay != 1:
            raise InputError("stage 2 trains no encoder: leave out vision_lr, text_lr and layer_decay")
        if self.r1_every < 1:
            raise InputError(f"r1_every is {self.r1_every}: it must be at least 1")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}: it must be in [0, 1)")


class Stage2:
    """The task: owns the tokenizer, its adversary, their losses and optimizers."""

    def __init__(self, model: QLIP, config: Stage2Config, compute: ComputeConfig, batch_size: int):
        """Prepare what is trained, and spread it over the processes.

        Args:
            model: trained in stage 1, on its device, in float32, with an image processor; the same everywhere.
            config: weights and optimizers.
            compute: how a step is computed.
            batch_size: samples of a step, over all processes.

        Raises:
            InputError: no weights for the perceptual loss, or a combination that cannot be.
        """
        self.num_parts = compute.num_parts(batch_size)
        part_size = batch_size // world_size() // self.num_parts
        if (
            config.adversarial_weight
            and config.adversary == "stylegan2"
            and part_size % StyleDiscriminator.group_size
        ):
            raise InputError(
                f"the {part_size} samples that a process takes at once are no multiple of the "
                f"{StyleDiscriminator.group_size} that the adversary 'stylegan2' compares: change batch_size or "
                "micro_batch_size, or take 'patchgan'"
            )
        self.model, self.config = model, config
        self.weights = {
            "reconstruction": config.reconstruction_weight,
            "quantizer/tokens": 0.0 if config.freeze_ids else config.quantizer_weight,
            "quantizer/codebook": 0.0 if config.freeze_ids else config.quantizer_weight,
            "perceptual": config.perceptual_weight,
            "adversarial": config.adversarial_weight,
        }
        self.weights = {name: weight for name, weight in self.weights.items() if weight}
        processor = model.need_image_processor()
        self.mean, self.std = (torch.tensor(x, device=model.device) for x in (processor.mean, processor.std))
        self.pixel_scale = pixel_scale(processor.std, config.pixel_scale).to(model.device)
        self.perceptual = load_perceptual(config.perceptual).to(model.device) if config.perceptual_weight else None
        model.requires_grad_(False)
        model.vision_decoder.requires_grad_(True)
        model.vision_model.quant_embed_post.requires_grad_(True)
        model.vision_model.quant_embed.requires_grad_(not config.freeze_ids)
        self.parallel = Parallel(_Forward(model), model, compute)
        self.optimizer = build_optimizer(model, config)
        self.optimizers = [self.optimizer]
        self.discriminator = self._build_adversary() if config.adversarial_weight else None
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and config.ema}
        self.averages = {name: p.detach().clone() for name, p in trained.items()}

    def _build_adversary(self) -> Discriminator:
        config, size = self.config, self.model.config.decoder.image_size
        discriminator = build_discriminator(config.adversary, size, config.discriminator_width)
        discriminator = discriminator.to(self.model.device)
        groups = make_groups(
            discriminator, lambda name: ("discriminator", config.discriminator_lr), config.weight_decay
        )
        self.optimizers.append(adamw(groups, config.betas, config.eps))
        return discriminator

    def step(self, batch: dict[str, Any], step: int) -> Terms:
        """One step of the tokenizer against the adversary of before, and one of the adversary.

        Args:
            batch: this rank's pixel_values; see `qlip.data.loader.batches`.
            step: its number, from 1.

        Returns:
            Every loss term unweighted, their weighted sum `loss`, gradient norms and diagnostics, as scalars.

        Raises:
            NonFinite: a loss or gradient is not finite; nothing has moved.
        """
        parts = split_batch({"pixel_values": batch["pixel_values"]}, self.num_parts)
        self.rebuilt: list[Tensor] = []
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        terms, metrics = backward(self._forward, parts, self._combine, self.weights, self.parallel.synchronize)
        self.parallel.finish_backward()
        loss = weighted_sum(terms, self.weights)
        if self.discriminator is not None:
            terms |= self._discriminate(self.discriminator, parts, step)
        norms: Terms = {}
        for optimizer in reversed(self.optimizers):  # so that `grad_norm` is the tokenizer's
            norms |= clip_gradients(optimizer.param_groups, self.config.grad_clip)
        check_finite(terms | norms)
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_averages()
        return {"loss": loss, **terms, **norms, **code_use(metrics)}

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that makes the run; filling them in place restores it."""
        state = prefixed("model", self.model.state_dict())
        state |= prefixed("optimizer", optimizer_state(self.optimizer, self.model))
        if self.discriminator is not None:
            state |= prefixed("discriminator", self.discriminator.state_dict())
            adversary = optimizer_state(self.optimizers[1], self.discriminator)
            state |= prefixed("discriminator_optimizer", adversary)
        return state | prefixed("ema", self.averages)

    def snapshot(self) -> QLIP:
        """A whole copy of the model, with the averaged weights if there are any; all ranks must call it."""
        return whole_copy(self.model, self.averages)

    def _forward(self, batch: dict[str, Tensor], with_terms: bool) -> Part:
        pixels = batch["pixel_values"].to(self.model.device)
        out, normalized = self.parallel(pixels, with_terms)
        if not with_terms:
            return out
        out.terms["reconstruction"] = pixel_mse(normalized, pixels, self.pixel_scale)
        rebuilt = self._unit(normalized)
        if self.perceptual is not None:
            with self.parallel.autocast():
                out.terms["perceptual"] = self.perceptual(rebuilt, self._unit(pixels)).mean()
        if self.discriminator is not None:
            with self.parallel.autocast():
                logits = self.discriminator(2 * rebuilt - 1)
            out.terms["adversarial"] = self.discriminator.generator_loss(logits)
            self.rebuilt.append(rebuilt.detach())
        return out

    def _combine(self, rows: Terms, means: Terms) -> Terms:
        probabilities = average(means["mean_probabilities"])
        return {"quantizer/codebook": codebook_term(probabilities, self.model.config.quantizer)}

    def _discriminate(self, discriminator: Discriminator, parts: list[dict[str, Tensor]], step: int) -> Terms:
        """Gradients of the discriminator, averaged over ranks: real pictures against those just rebuilt."""
        config = self.config
        discriminator.requires_grad_(True)
        penalized = config.adversary == "stylegan2" and config.r1_weight and step % config.r1_every == 0
        values: dict[str, list[Tensor]] = {}
        for part, rebuilt in zip(parts, self.rebuilt, strict=True):
            real = 2 * self._unit(part["pixel_values"].to(self.model.device)) - 1
            with self.parallel.autocast():
                logits = discriminator(real), discriminator(2 * rebuilt - 1)
            terms = {"discriminator": discriminator.discriminator_loss(*logits)}
            if penalized:
                terms["r1"] = r1_penalty(discriminator, real, config.r1_weight, config.r1_every)
            (torch.stack(list(terms.values())).sum() / len(parts)).backward()
            for name, value in terms.items():
                values.setdefault(name, []).append(value.detach())
        average_gradients(discriminator)
        return {name: torch.stack(each).mean() for name, each in values.items()}

    @torch.no_grad()
    def _update_averages(self) -> None:
        parameters = dict(self.model.named_parameters())
        means = local_shards(self.averages.values())
        for mean, now in zip(means, local_shards(parameters[name] for name in self.averages), strict=True):
            mean.lerp_(now, 1 - self.config.ema)

    def _unit(self, normalized: Tensor) -> Tensor:
        """Normalised pixels → [0, 1], not clamped, so that gradients flow."""
        return normalized.float() * self.std[:, None, None] + self.mean[:, None, None]


class _Forward(nn.Module):
    """The tokenizer's part of stage 2's forward pass."""

    def __init__(self, model: QLIP):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, with_terms: bool) -> tuple[Part, Tensor | None]:
        """(B, 3, H, W) → `Part`; with its terms also metrics, and the reconstructions in normalised pixels."""
        model = self.model
        with torch.no_grad():
            features = model.hidden_states(pixel_values)[:, 1:]
        latents = model.compress(features)
        codes = model.quantize(latents)
        tokens, probabilities = token_terms(latents, model.config.quantizer)
        metrics = code_metrics(codes) if with_terms else {}
        part = Part({"quantizer/tokens": tokens}, {}, {"mean_probabilities": probabilities}, metrics)
        return part, model.decode(codes, model.grid_of(pixel_values)) if with_terms else None
