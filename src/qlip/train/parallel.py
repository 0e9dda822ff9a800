"""How a step is computed: device, precision, memory, several processes. None of it changes what is learnt."""

import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qlip.errors import InputError
from qlip.lm.transformer import Attention as CausalAttention
from qlip.lm.transformer import Transformer
from qlip.model.checkpoint import skeleton
from qlip.model.layers import Attention, Blocks
from qlip.model.qlip import QLIP
from qlip.precision import WORTH, Work, speedup
from qlip.train.distributed import any_rank, average, rank, world_size

Precision = Literal["auto", "bf16", "fp32"]
logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed.

    Attributes:
        device: "cpu", "cuda", …; "auto" takes a GPU if there is one.
        precision: "bf16" computes in bfloat16 where that is safe (autocast), "fp32" in float32; weights are
            float32 in both. "auto" measures which is faster on the device (`qlip.precision`), and takes bfloat16
            if it is at least 1.2 times as fast. A resumed run keeps its own.
        attention: the same for attention alone, which may be slower in bfloat16 where products are faster.
        micro_batch_size: samples that a process holds at once; a larger share of the batch goes in parts, with
            the same gradient (`qlip.train.caching`). None: the whole share.
        sharding: with several processes, "ddp" keeps the model on each, "fsdp" shares it out (FSDP2).
        recompute: hold less for the backward pass and compute it again (activation checkpointing).
        compile: compile the blocks, which takes a minute. Where there is no compiler, the log says so, and the run
            does without.
        deterministic: only algorithms that give the same bits each time; slower on a GPU.
    """

    device: str = "auto"
    precision: Precision = "auto"
    attention: Precision = "auto"
    micro_batch_size: int | None = None
    sharding: Literal["ddp", "fsdp"] = "ddp"
    recompute: bool = False
    compile: bool = False
    deterministic: bool = False

    def num_parts(self, batch_size: int) -> int:
        """In how many parts a process takes its share of the batch.

        Raises:
            InputError: the batch cannot be shared out equally.
        """
        share, rest = divmod(batch_size, world_size())
        if rest:
            raise InputError(f"batch_size {batch_size} is not divisible by the {world_size()} processes")
        size = share if self.micro_batch_size is None else self.micro_batch_size
        if size < 1 or share % size:
            raise InputError(f"micro_batch_size {size} does not divide the {share} samples of a process")
        return share // size


Config = TypeVar("Config", bound=ComputeConfig)


def settled(config: Config, device: torch.device) -> Config:
    """The same with nothing left that is "auto". All ranks call it, and get what the first one measures."""
    precision, attention = config.precision, config.attention
    if precision == "auto":
        precision = _choice(device, "product")
    if attention == "auto":
        attention = _choice(device, "attention") if precision == "bf16" else "fp32"
    compile = config.compile and not any_rank(not _can_compile(device.type))
    return replace(config, precision=precision, attention=attention, compile=compile)


def _choice(device: torch.device, work: Work) -> Precision:
    return "bf16" if any_rank(rank() == 0 and _is_faster(device, work)) else "fp32"


@cache
def _is_faster(device: torch.device, work: Work) -> bool:
    """Whether bfloat16 is worth it here; said once in the log."""
    ratio = speedup(device, torch.bfloat16, work)
    what, name = ("precision", "attention")[work == "attention"], ("float32", "bfloat16")[ratio >= WORTH]
    logger.info("%s: %s (bfloat16 runs at %.2g times the speed of float32 here)", what, name, ratio)
    return ratio >= WORTH


@cache
def _can_compile(device_type: str) -> bool:
    """Whether what `torch.compile` calls is here; if not, the log says once what is missing."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    needs = {
        "the C++ compiler": bool(shutil.which(compiler)),
        "Python.h, of a package such as python3-dev,": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    if device_type == "cuda":
        needs = {"Triton": bool(find_spec("triton"))}
    missing = [name for name, there in needs.items() if not there]
    if missing:
        logger.warning("compile: %s is not here, and the run does without; it will be slower", missing[0])
    return not missing


class Parallel:
    """A module whose forward pass is the training step's, on all processes.

    Everything of `model` that the step uses must be used inside the module's forward.
    """

    def __init__(self, module: nn.Module, model: Any, config: ComputeConfig, others: Sequence[nn.Module] = ()):
        """Prepare the blocks of all towers and transformers, then spread the module.

        Args:
            module: its forward is the step's; it holds `model`.
            model: on its device, float32, the same on every process.
            config: how; what is "auto" of it is settled here.
            others: blocks that are not ours; they recompute nothing by themselves.

        Raises:
            InputError: sharding over a single process.
        """
        config = settled(config, model.device)
        self.device_type, self.bf16 = model.device.type, config.precision == "bf16"
        for part in module.modules():
            if isinstance(part, Attention | CausalAttention):
                part.in_float32 = config.attention == "fp32"
        self.scalars = {p for p in module.parameters() if p.ndim == 0}  # FSDP2 cannot share them out
        stacks = [part for part in module.modules() if isinstance(part, Blocks | Transformer)]
        blocks = [block for stack in stacks for block in stack.layers] + list(others)
        for stack in stacks:
            stack.recompute = config.recompute
        if config.compile:
            for block in blocks:
                block.compile()
        if config.sharding == "fsdp":
            if not dist.is_initialized():
                raise InputError("sharding is 'fsdp', but there is one process: start several with torchrun")
            mesh = init_device_mesh(model.device.type, (world_size(),))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh, ignored_params=self.scalars)
        elif world_size() > 1:
            with warnings.catch_warnings():  # torch 2.13 has another name for the option, which 2.11 does not know
                warnings.simplefilter("ignore", FutureWarning)
                module = DistributedDataParallel(module, broadcast_buffers=False)  # no buffer changes
        self.module: nn.Module = module

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward in the config's precision."""
        with self.autocast():
            return self.module(*inputs)

    def autocast(self) -> torch.autocast:
        """The config's precision, for what else a step computes."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16)

    def synchronize(self, now: bool) -> None:
        """Whether the coming backward pass averages gradients over ranks."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(now)
        elif isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = now

    def finish_backward(self) -> None:
        """Average over ranks what the wrapper does not."""
        if isinstance(self.module, FSDPModule):
            for scalar in self.scalars:
                if scalar.grad is not None:
                    scalar.grad = average(scalar.grad)


def whole_copy(model: QLIP, replaced: dict[str, Tensor] | None = None) -> QLIP:
    """An unsharded copy in evaluation mode, with some tensors replaced; all ranks must call it."""
    tensors = model.state_dict() | (replaced or {})
    copy = skeleton(model.config, model.name)
    copy.load_state_dict({name: whole(tensor).clone() for name, tensor in tensors.items()}, assign=True)
    copy.image_processor, copy.text_tokenizer = model.image_processor, model.text_tokenizer
    return copy.to(model.device).eval()


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together from its shards if it is sharded; all ranks must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
