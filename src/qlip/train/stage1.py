"""Stage 1: alignment and reconstruction together.

α_r·MSE + α_q·L_BSQ + α_a·L_align + α_z·‖sg(Ẑ) − Z‖²  (docs/paper.md section 2, eq. 3)

With a teacher, beyond the paper: + α_t·(1 − cos(linear(CLS), teacher's pooled feature)), and the same of the grid.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qlip.data.teacher import Teacher
from qlip.errors import InputError
from qlip.model.config import Grid
from qlip.model.qlip import QLIP
from qlip.model.quantizer import codebook_term, token_terms
from qlip.train.balance import Balance, ratio, read_calibration
from qlip.train.caching import Part, Terms, backward, split_batch, weighted_sum
from qlip.train.distributed import average, world_size
from qlip.train.flops import num_kept
from qlip.train.losses import (
    PixelScale,
    commitment_loss,
    contrastive_loss,
    pixel_mse,
    pixel_scale,
    sigmoid_loss,
    teacher_loss,
    teacher_shares,
)
from qlip.train.metrics import code_metrics, code_use
from qlip.train.optim import OptimizerConfig, build_optimizer, clip_gradients, optimizer_state
from qlip.train.parallel import ComputeConfig, Parallel, whole, whole_copy
from qlip.train.task import check_finite, prefixed

MAX_LOGIT_SCALE = math.log(100)
SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = math.log(10), -10.0  # where SigLIP begins


@dataclass(frozen=True)
class Stage1Config(OptimizerConfig):
    """Weights and optimizer of stage 1.

    A weight of 0 leaves its loss out, and freezes what no other loss trains: reconstruction_weight 0 is the
    contrastive-only baseline, alignment_weight 0 the reconstruction-only one.

    Attributes:
        reconstruction_weight: α_r, of the MSE.
        alignment_weight: α_a, of the contrastive loss.
        quantizer_weight: α_q, of the BSQ loss.
        commitment_weight: α_z.
        contrastive: "softmax": InfoNCE, as CLIP and the paper. "sigmoid": SigLIP's loss, which looks at each pair
            of image and text by itself. Its logit_scale begins at ln 10, whatever the model's is, and its bias at
            −10; the bias is part of checkpoints but not of the exported model.
        teacher_weight: α_t, of the cosine distance to a teacher's features, where the run has a teacher.
        pixel_scale: the MSE is of pixels in [0,1] ("unit") or of normalised ones ("normalized").
        quantize: False lets the patch features go to the decoder as they are: Recipe 2 of the paper's Table 3c.
        reconstruct_every: distance between the images of a batch that are reconstructed; 4 takes every fourth.
            The others learn by alignment alone, without quantizer and decoder, which saves time.
        drop_tokens: share of the patches that those others leave out, in [0, 1), as FLIP does (arXiv 2212.00794).
            Each step draws which, the same for all its images, whatever the parts and processes are.
        balance: where α_r comes from. "fixed": `reconstruction_weight`; "calibrated": the file that
            `qlip calibrate` wrote; "gradient": α_a times the ratio of both losses' gradient norms at the last MLP
            of the vision encoder, measured during training.
        calibration: the file that `qlip calibrate` wrote.
        balance_every: steps between measurements of the gradient norms; each costs two further passes.
        balance_smoothing: share of the old value that the running mean of a norm keeps at a measurement.
    """

    reconstruction_weight: float = 1e3
    alignment_weight: float = 1.0
    quantizer_weight: float = 1.0
    commitment_weight: float = 1.0
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    teacher_weight: float = 1.0
    pixel_scale: PixelScale = "unit"
    quantize: bool = True
    reconstruct_every: int = 1
    drop_tokens: float = 0.0
    balance: Literal["fixed", "calibrated", "gradient"] = "fixed"
    calibration: Path | None = None
    balance_every: int = 20
    balance_smoothing: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if self.contrastive not in ("softmax", "sigmoid"):
            raise InputError(f"contrastive is {self.contrastive!r}: choose softmax or sigmoid")
        if not self.reconstruction_weight and not self.alignment_weight:
            raise InputError("reconstruction_weight and alignment_weight are both 0: nothing would be learnt")
        if not self.reconstruction_weight and self.commitment_weight:
            raise InputError(
                "reconstruction_weight is 0: set commitment_weight to 0 too, the up MLP is not trained"
            )
        if not self.quantize and (self.quantizer_weight or self.commitment_weight):
            raise InputError("quantize is False: set quantizer_weight and commitment_weight to 0")
        if self.reconstruct_every < 1 or self.balance_every < 1:
            raise InputError("reconstruct_every and balance_every must be at least 1")
        if not 0 <= self.drop_tokens < 1:
            raise InputError(f"drop_tokens is {self.drop_tokens}: it must be a share in [0, 1)")
        if self.drop_tokens and self.reconstruct_every == 1:
            raise InputError("drop_tokens is for images that are not reconstructed: set reconstruct_every above 1")
        if self.reconstruct_every > 1 and not (self.reconstruction_weight and self.alignment_weight):
            raise InputError(
                "reconstruct_every leaves images to alignment alone: neither weight may be 0, or set it to 1"
            )
        if not 0 <= self.balance_smoothing < 1:
            raise InputError(f"balance_smoothing is {self.balance_smoothing}: it must be in [0, 1)")
        if (self.balance == "calibrated") != (self.calibration is not None):
            raise InputError("balance 'calibrated' and calibration go together: write it with `qlip calibrate`")
        if self.balance != "fixed" and not (self.reconstruction_weight and self.alignment_weight):
            raise InputError(f"balance {self.balance!r} weighs two losses: neither weight may be 0")


class Stage1:
    """The task: owns the model, its losses and its optimizer."""

    def __init__(
        self,
        model: QLIP,
        config: Stage1Config,
        compute: ComputeConfig,
        batch_size: int,
        teacher: Teacher | None = None,
    ):
        """Prepare optimizer and processes.

        Args:
            model: on its device, in float32, with an image processor; the same on every process.
            config: weights and optimizer.
            compute: how a step is computed.
            batch_size: samples of a step, over all processes.
            teacher: whose features batches have; None, or a weight of 0, trains without.

        Raises:
            InputError: a combination that cannot be: of widths, of a batch and its parts, of grids.
        """
        teacher = teacher if config.teacher_weight else None
        self.num_parts = compute.num_parts(batch_size)
        _check(model, config, self.num_parts, batch_size)
        if teacher:
            _check_grid(model, teacher)
        self.model, self.config = model, config
        alpha = config.reconstruction_weight
        if config.calibration:
            alpha = config.alignment_weight * read_calibration(config.calibration)
        self.weights = {
            "reconstruction": alpha,
            "alignment": config.alignment_weight,
            "quantizer/tokens": config.quantizer_weight,
            "quantizer/codebook": config.quantizer_weight,
            "commitment": config.commitment_weight,
        }
        self.weights = {name: weight for name, weight in self.weights.items() if weight}
        if teacher:
            self.weights |= {f"teacher/{name}": config.teacher_weight for name in _target_widths(teacher)}
        _freeze_unused(model, config)
        forward = _Forward(model, config, teacher)
        self.extra = forward.extra
        self.parallel = Parallel(forward, model, compute)
        self.optimizer = build_optimizer(model, config, self.extra)
        self.optimizers = [self.optimizer]
        self.balance = Balance(config.balance_smoothing, model.device)

    def step(self, batch: dict[str, Any], step: int) -> Terms:
        """One optimizer step.

        Args:
            batch: this rank's pixel_values, input_ids, group, keys, and a teacher's features where the task has
                one; see `qlip.data.loader.batches`.
            step: its number, from 1.

        Returns:
            Every loss term unweighted, their weighted sum `loss`, gradient norms and diagnostics, as scalars.

        Raises:
            NonFinite: a loss or gradient is not finite; nothing has moved.
        """
        parts, group = self._parts(batch, step)
        means = self.balance.state
        if self.config.balance == "gradient":
            if (step - 1) % self.config.balance_every == 0 or not self.balance.measured():
                means = self.balance.after(self.gradient_norms(batch, step))
            self.weights["reconstruction"] = self.config.alignment_weight * ratio(means)
        terms, metrics = self._backward(parts, group, self.weights)
        norms = clip_gradients(self.optimizer.param_groups, self.config.grad_clip)
        loss = weighted_sum(terms, self.weights)
        check_finite(terms | norms)
        self.optimizer.step()
        self.balance.update(means)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        values = {"loss": loss, **terms, **norms, **code_use(metrics)}
        if self.config.alignment_weight:
            values["logit_scale"] = self.model.logit_scale.detach().clone()
        if self.extra.logit_bias is not None:
            values["logit_bias"] = self.extra.logit_bias.detach().clone()
        if self.config.balance == "gradient":
            values["reconstruction_weight"] = loss.new_tensor(self.weights["reconstruction"])
        return values

    def gradient_norms(self, batch: dict[str, Any], step: int) -> Terms:
        """How long each loss's gradient is at the last linear of the vision encoder's last MLP (paper, Figure 5).

        It takes the ordinary backward pass over the whole batch, once for each loss.

        Args:
            batch: as for `step`; neither of the two losses may have been left out by a weight of 0.
            step: its number.

        Returns:
            "alignment" and "reconstruction", the norms of the unweighted losses' gradients.
        """
        parts, group = self._parts(batch, step)
        vision = self.model.config.vision
        name = f"layers.{vision.num_hidden_layers - 1}.mlp.{'w3' if vision.swiglu else 'fc2'}.weight"
        weight = self.model.vision_model.encoder.get_parameter(name)
        norms = {}
        for name in ("alignment", "reconstruction"):
            self._backward(parts, group, {other: float(other == name) for other in self.weights})
            norms[name] = whole(cast(Tensor, weight.grad)).norm()
        return norms

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that makes the run; filling them in place restores it."""
        state = prefixed("model", self.model.state_dict())
        state |= prefixed("extra", self.extra.state_dict())
        for module in (self.model, self.extra):
            state |= prefixed("optimizer", optimizer_state(self.optimizer, module))
        return state | prefixed("balance", self.balance.state)

    def snapshot(self) -> QLIP:
        """A whole copy of the model for evaluation and export; all ranks must call it."""
        return whole_copy(self.model)

    def _parts(self, batch: dict[str, Any], step: int) -> tuple[list[dict[str, Any]], Tensor]:
        """The batch in the parts that are computed at once, and its samples' groups."""
        used = {name: batch[name] for name in ("pixel_values", "input_ids")}
        if self.extra.heads:
            used |= {f"teacher/{name}": batch[f"teacher/{name}"] for name in self.extra.heads}
            used["teacher/share"] = teacher_shares(batch["teacher/pooled"].to(self.model.device))
        parts = split_batch(used, self.num_parts)
        if self.config.drop_tokens:
            rows, columns = self.model.grid_of(batch["pixel_values"])
            order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(step))
            kept = order[: num_kept(rows * columns, self.config.drop_tokens)]
            parts = [part | {"kept": kept} for part in parts]
        return parts, batch["group"].to(self.model.device)

    def _backward(self, parts: list, group: Tensor, weights: dict[str, float]) -> tuple[Terms, Terms]:
        """Gradient of the weighted losses of the whole batch, averaged over ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        result = backward(self._forward, parts, partial(self._combine, group), weights, self.parallel.synchronize)
        self.parallel.finish_backward()
        return result

    def _forward(self, batch: dict[str, Any], with_terms: bool) -> Part:
        return self.parallel({name: value.to(self.model.device) for name, value in batch.items()}, with_terms)

    def _combine(self, group: Tensor, rows: Terms, means: Terms) -> Terms:
        """The losses that look at the batch as a whole."""
        terms = {}
        if "alignment" in self.weights:
            embeds = rows["image_embeds"], rows["text_embeds"]
            if self.config.contrastive == "sigmoid":
                terms["alignment"] = sigmoid_loss(*embeds, means["scale"], means["bias"], group)
            else:
                terms["alignment"] = contrastive_loss(*embeds, means["scale"], group)
        if "mean_probabilities" in means:
            probabilities = average(means["mean_probabilities"])
            terms["quantizer/codebook"] = codebook_term(probabilities, self.model.config.quantizer)
        return terms


class _Forward(nn.Module):
    """The forward pass of stage 1: everything of the model that a step uses.

    Attributes:
        extra: parameters that the losses train beside the model; they are no part of it.
    """

    pixel_scale: Tensor

    def __init__(self, model: QLIP, config: Stage1Config, teacher: Teacher | None = None):
        super().__init__()
        self.model, self.config = model, config
        scale = pixel_scale(model.need_image_processor().std, config.pixel_scale)
        self.register_buffer("pixel_scale", scale.to(model.device), persistent=False)
        self.teacher = teacher
        self.extra = _Extra(model, config, teacher).to(model.device)

    def forward(self, batch: dict[str, Tensor], with_terms: bool) -> Part:
        """A part of a batch → `Part`; without its terms only what the batch's losses need."""
        model, config = self.model, self.config
        pixel_values, input_ids = batch["pixel_values"], batch["input_ids"]
        part = Part({}, {}, {}, {})
        chosen = slice(None, None, config.reconstruct_every)
        cls, features = self._encode(pixel_values, batch.get("kept"))
        if config.alignment_weight:
            part.rows["image_embeds"] = model.project(cls)
            part.rows["text_embeds"] = model.encode_text(input_ids)
            part.means["scale"] = model.logit_scale.exp()
            if self.extra.logit_bias is not None:
                part.means["bias"] = self.extra.logit_bias.clone()
        quantized = features
        if config.quantize and (config.reconstruction_weight or config.quantizer_weight):
            latents = model.compress(features)
            part.terms["quantizer/tokens"], part.means["mean_probabilities"] = token_terms(
                latents, model.config.quantizer
            )
            codes = model.quantize(latents)
            if with_terms:
                part.metrics.update(code_metrics(codes))
            if with_terms and config.reconstruction_weight:
                quantized = model.expand(codes)
            if with_terms and config.commitment_weight:
                part.terms["commitment"] = commitment_loss(features, quantized)
        if with_terms and config.reconstruction_weight:
            pixels = model.vision_decoder(quantized, model.grid_of(pixel_values))
            part.terms["reconstruction"] = pixel_mse(pixels, pixel_values[chosen], self.pixel_scale)
        if with_terms and self.teacher:
            share = batch["teacher/share"]
            part.terms["teacher/pooled"] = teacher_loss(
                self.extra.heads["pooled"](cls), batch["teacher/pooled"], share
            )
            if "grid" in self.extra.heads:
                predicted = self.extra.heads["grid"](
                    _pool(features, model.grid_of(pixel_values), self.teacher.grid)
                )
                part.terms["teacher/grid"] = teacher_loss(predicted, batch["teacher/grid"][chosen], share[chosen])
        return part

    def _encode(self, pixel_values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """CLS (B, D) of all images, and patch features (B / reconstruct_every, N, D) of the reconstructed ones.

        Of the others only the patches numbered in `kept` (K,) are encoded; None: all.
        """
        every = self.config.reconstruct_every
        if kept is None:
            hidden = self.model.hidden_states(pixel_values)
            return hidden[:, 0], hidden[::every, 1:]
        groups = pixel_values.unflatten(0, (-1, every))  # the first of each is reconstructed
        whole = self.model.hidden_states(groups[:, 0])
        others = self.model.hidden_states(groups[:, 1:].flatten(0, 1), kept)
        cls = torch.cat((whole[:, :1], others[:, 0].unflatten(0, (-1, every - 1))), dim=1)
        return cls.flatten(0, 1), whole[:, 1:]


class _Extra(nn.Module):
    """What the losses train beside the model: the sigmoid's bias, and heads that predict a teacher's features."""

    def __init__(self, model: QLIP, config: Stage1Config, teacher: Teacher | None):
        super().__init__()
        self.logit_bias: nn.Parameter | None = None
        if config.alignment_weight and config.contrastive == "sigmoid":
            nn.init.constant_(model.logit_scale, SIGMOID_LOGIT_SCALE)
            self.logit_bias = nn.Parameter(torch.full_like(model.logit_scale, SIGMOID_LOGIT_BIAS))
        widths = _target_widths(teacher) if teacher else {}
        heads = {name: _head(model.config.vision.hidden_size, width) for name, width in widths.items()}
        self.heads = nn.ModuleDict(heads)


def _target_widths(teacher: Teacher) -> dict[str, int]:
    return {"pooled": teacher.width} | ({"grid": teacher.grid_width} if teacher.grid_width else {})


def _head(width: int, out: int) -> nn.Linear:
    """A linear layer with a seed of its own: equal on all ranks, and other random numbers stay as they are."""
    head = nn.utils.skip_init(nn.Linear, width, out)
    nn.init.normal_(head.weight, std=width**-0.5, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(head.bias)
    return head


def _pool(features: Tensor, grid: Grid, target: Grid) -> Tensor:
    """(B, N, D) of a grid → (B, rows, columns, D), means over the patches of each cell of a coarser grid."""
    cells = features.unflatten(1, (target[0], grid[0] // target[0], target[1], grid[1] // target[1]))
    return cells.mean((2, 4))


def _check(model: QLIP, config: Stage1Config, num_parts: int, batch_size: int) -> None:
    widths = model.config.vision.hidden_size, model.config.hidden_size_post_q
    if config.commitment_weight and widths[0] != widths[1]:
        raise InputError(f"commitment compares latents of widths {widths}: set commitment_weight to 0")
    if not config.quantize and widths[0] != widths[1]:
        raise InputError(f"quantize is False, but encoder and decoder have widths {widths}: make them equal")
    part_size = batch_size // world_size() // num_parts
    if part_size % config.reconstruct_every:
        raise InputError(
            f"reconstruct_every {config.reconstruct_every} does not divide the {part_size} samples that a process "
            "takes at once (micro_batch_size)"
        )


def _check_grid(model: QLIP, teacher: Teacher) -> None:
    own = model.config.grid
    if teacher.grid_width and any(mine % theirs for mine, theirs in zip(own, teacher.grid, strict=True)):
        raise InputError(
            f"the model's grid of {own[0]} × {own[1]} tokens is no multiple of the teacher's {teacher.grid[0]} × "
            f"{teacher.grid[1]}: compute its features with another --grid"
        )


def _freeze_unused(model: QLIP, config: Stage1Config) -> None:
    """Leave out of training what no loss reaches; DDP and the optimizer would wait for its gradient."""
    align, reconstruct = bool(config.alignment_weight), bool(config.reconstruction_weight)
    vision = model.vision_model
    for module in (model.text_model, model.text_projection, model.visual_projection, vision.post_layernorm):
        module.requires_grad_(align)
    model.logit_scale.requires_grad_(align)
    model.vision_decoder.requires_grad_(reconstruct)
    vision.quant_embed_post.requires_grad_(reconstruct and config.quantize)
    vision.quant_embed.requires_grad_(config.quantize and (reconstruct or bool(config.quantizer_weight)))
