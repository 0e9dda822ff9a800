"""LLaVA's training: first the projector alone, then projector and language model; the eye stays as it is.

The loss is the cross-entropy of the answers' tokens, over all those of the batch (docs/paper.md section 5).
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip.errors import InputError, MissingExtra
from qlip.llava.data import IGNORED
from qlip.llava.model import copy_of
from qlip.train.caching import Terms, split_batch
from qlip.train.distributed import average
from qlip.train.optim import AdamWConfig, clip_gradients, make_groups, make_optimizer, optimizer_state
from qlip.train.parallel import ComputeConfig, Parallel, whole
from qlip.train.task import check_finite, prefixed

_PROJECTOR = "model.multi_modal_projector."


@dataclass(frozen=True)
class LlavaTaskConfig(AdamWConfig):
    """What moves, and how.

    Attributes:
        train: "projector" (LLaVA's first stage), or "llm": it and the language model (the second).
        lr: peak learning rate.
        projector_lr: the projector's; None takes `lr`. LLaVA's LoRA recipe has 2e-5 beside 2e-4.
        lora_rank: 0 trains the language model itself, more trains that much of LoRA beside each of its linear
            layers but the output; it needs `peft`. LLaVA's recipe has 128.
        lora_alpha: LoRA's scale times its rank; LLaVA: 256.
        lora_dropout: share of LoRA's inputs that is left out.
        optimizer, betas, weight_decay, grad_clip: see `AdamWConfig`.
    """

    train: Literal["projector", "llm"] = "llm"
    lr: float = 2e-5
    projector_lr: float | None = None
    lora_rank: int = 0
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("projector_lr", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}: it must be above 0")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank is {self.lora_rank}: it must be 0 or more")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}: it must be a share in [0, 1)")
        if self.train == "projector" and self.lora_rank:
            raise InputError("lora_rank is for the language model, and train is 'projector': leave it out")


class LlavaTask:
    """The task: owns the model, its loss and its optimizer."""

    def __init__(self, model: Any, config: LlavaTaskConfig, compute: ComputeConfig, batch_size: int):
        """Freeze what stays, add LoRA if asked for, spread it over the processes.

        Args:
            model: LLaVA, of `qlip.llava.build` or `load`, on its device; the same on every process.
            config: what moves.
            compute: how a step is computed.
            batch_size: conversations of a step, over all processes.

        Raises:
            InputError: LoRA without `peft`, or a batch that cannot be shared out.
        """
        self.num_parts = compute.num_parts(batch_size)
        self.model, self.config = model, config
        language = model.model.language_model
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        if config.lora_rank:
            _add_lora(language, config)
        elif config.train == "llm":
            language.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        if compute.recompute:
            language.gradient_checkpointing_enable({"use_reentrant": False})
        self.parallel = Parallel(_Forward(model), model, compute, list(language.layers))
        projector_lr = config.lr if config.projector_lr is None else config.projector_lr

        def place(name: str) -> tuple[str, float]:
            return ("projector", projector_lr) if _PROJECTOR in name else ("llm", config.lr)

        groups = make_groups(model, place, config.weight_decay)
        self.optimizer = make_optimizer(config.optimizer, groups, config.betas, eps=1e-8)
        self.optimizers = [self.optimizer]

    def step(self, batch: dict[str, Any], step: int) -> Terms:
        """One optimizer step.

        Args:
            batch: this rank's pixel_values, input_ids, attention_mask, labels; see `qlip.llava.data`.
            step: its number, from 1.

        Returns:
            `loss`, the mean over the answers' tokens; `accuracy`, the share of them that the model would have
            chosen; gradient norms.

        Raises:
            NonFinite: the loss or a gradient is not finite; nothing has moved.
        """
        device = self.model.device
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        parts = split_batch(tensors, self.num_parts)
        # Of a rank's share; its mean over ranks, since gradients are averaged too.
        count = average((tensors["labels"][:, 1:] != IGNORED).sum().float()).clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        sums: list[Tensor] = []
        for i, part in enumerate(parts):
            self.parallel.synchronize(i == len(parts) - 1)
            loss, hits = self.parallel(part)
            (loss / count).backward()
            sums.append(torch.stack((loss.detach(), hits)))
        self.parallel.finish_backward()
        loss, accuracy = (average(torch.stack(sums).sum(0)) / count).unbind()
        norms = clip_gradients(self.optimizer.param_groups, self.config.grad_clip)
        check_finite({"loss": loss} | norms)
        self.optimizer.step()
        return {"loss": loss, "accuracy": accuracy, **norms}

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained, and its optimizer's state; the rest is where the run began."""
        state = prefixed("model", {name: p for name, p in self.model.named_parameters() if p.requires_grad})
        return state | prefixed("optimizer", optimizer_state(self.optimizer, self.model))

    def snapshot(self) -> Any:
        """The model in evaluation mode, whole, with LoRA merged; it may share memory with the one trained."""
        tensors = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        return copy_of(self.model, merged(tensors, self.config.lora_alpha))


class _Forward(nn.Module):
    """The forward pass of a step: everything of the model that it uses."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A part of the batch → the sum of its answers' losses, and how many of their tokens are the likeliest."""
        model, input_ids = self.model, batch["input_ids"]
        model.train()
        model.model.vision_tower.eval()
        pictured = (input_ids == model.config.image_token_id).any(1)
        if pictured.any():
            inputs = {"input_ids": input_ids, "pixel_values": batch["pixel_values"][pictured]}
        else:  # other ranks may have pictures, and wait for this one at every block, forwards and backwards
            unseen = model.model.get_image_features(pixel_values=batch["pixel_values"][:1]).pooler_output
            inputs = {"inputs_embeds": model.get_input_embeddings()(input_ids) + 0 * torch.cat(list(unseen)).sum()}
        mask = batch["attention_mask"]
        hidden = model.model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        answered = batch["labels"][:, 1:] != IGNORED
        labels = batch["labels"][:, 1:][answered]
        logits = model.lm_head(hidden[:, :-1][answered]).float()  # of the answers alone: a vocabulary is wide
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return loss, (logits.argmax(-1) == labels).sum().float()


def merged(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state with LoRA's matrices added to the layers that they stand beside: W + alpha/rank · B·A."""
    plain = {}
    for name, tensor in tensors.items():
        layer = re.sub(r"\.base_layer\.weight$", "", name)
        if layer != name:
            down, up = (tensors[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            plain[f"{layer}.weight"] = tensor + alpha / len(down) * (up @ down)
        elif ".lora_" not in name:
            plain[name.replace(".base_layer.", ".")] = tensor
    return plain


def _add_lora(language: nn.Module, config: LlavaTaskConfig) -> None:
    """Put LoRA beside every linear layer of the language model, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("lora_rank needs the library `peft`: pip install 'open-qlip[llava]'") from error
    linear = sorted(
        {name.split(".")[-1] for name, part in language.named_modules() if isinstance(part, nn.Linear)}
    )
    inject_adapter_in_model(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=linear,
        ),
        language,
    )
    for name, p in language.named_parameters():
        p.requires_grad_(".lora_" in name)
