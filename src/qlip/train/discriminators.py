"""The adversaries of stage 2: two discriminators, each with its losses, and the R1 penalty.

The paper leaves the adversary open (docs/paper.md section 3). "stylegan2" is what its first author's BSQ-ViT uses:
the residual discriminator of StyleGAN2 (arXiv 1912.04958), non-saturating loss, lazy R1. "patchgan" is the field's
other standard: the 70×70 PatchGAN of pix2pix (arXiv 1611.07004) with the hinge loss, as VQGAN has it.

Both take pictures (B, 3, H, W) in [-1, 1], run under autocast, give float32 logits, can be differentiated twice.
Both are made so that two processes with half a batch each do what one does with the whole: a sample depends on no
other, or on its own group of `group_size` consecutive samples only, and there are no running statistics. There is
no buffer at all: DDP writes buffers before each forward, which spoils the graph of the one before (real, fake).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip.errors import InputError


def build_discriminator(kind: str, image_size: int, width: int = 512) -> "StyleDiscriminator | PatchDiscriminator":
    """The discriminator of an adversary, initialised at random.

    Args:
        kind: "stylegan2" or "patchgan".
        image_size: side of the pictures, at least 32.
        width: channels of the widest layer, a multiple of 32; 512 is the published size.

    Raises:
        InputError: one of them is not so.
    """
    if kind not in ("stylegan2", "patchgan"):
        raise InputError(f"adversary {kind!r} is unknown: use 'stylegan2' or 'patchgan'")
    if image_size < 32:
        raise InputError(f"image_size is {image_size}: a discriminator needs at least 32")
    if width < 32 or width % 32:
        raise InputError(f"discriminator width is {width}: use a multiple of 32")
    return StyleDiscriminator(image_size, width) if kind == "stylegan2" else PatchDiscriminator(width)


def r1_penalty(discriminator: nn.Module, real: Tensor, gamma: float = 10.0, interval: int = 16) -> Tensor:
    """γ/2 · E‖∇ΣD(x)‖² · interval: keeps a discriminator flat around real pictures (arXiv 1801.04406).

    Lazy, as in StyleGAN2: added on every `interval`-th step, the factor makes up for the others; `interval=1` is
    the plain penalty. The norm is over a picture's pixels, the mean over pictures; what is differentiated is the
    sum of all logits, those of all patches too. In float32 whatever the autocast outside.

    Args:
        discriminator: in DDP or plain; what is compiled or sharded by FSDP2 cannot be differentiated twice.
        real: (B, 3, H, W) in [-1, 1]; no gradient flows back into it.
        gamma: γ, for pixels in [-1, 1].
        interval: steps from one penalty to the next.

    Returns:
        () float32.
    """
    with torch.autocast(real.device.type, enabled=False):
        real = _float(real.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return interval * gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


class StyleDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2: one logit a picture; 28.9 M parameters at 256 pixels, width 512.

    from-RGB 1×1 → blocks that halve the side until it is at most 4 → the group's standard deviation as one more
    channel → 3×3 → linear → linear. At side s there are min(width, 64·width/s) channels, but at least 8; width 512
    is the published layout ("config F", channel multiplier 2).

    Any size will do. An odd side is first extended by a row and a column of zeros, so halving rounds up and the
    last side is 3 or 4; channels are those of the next power of two (392, 196, 98, 49, 25, 13, 7, 4: as for 512).

    Groups are of 4 consecutive samples (StyleGAN2 takes every B/4-th), so a rank or a micro-batch holds whole
    groups if its batch is a multiple of 4; then no split changes a logit. Where it is not, the last samples are
    a smaller group; a sample alone has deviation 0. So pass real and generated pictures separately.

    What follows the last block is float32 under autocast too.
    """

    group_size = 4

    def __init__(self, image_size: int, width: int = 512):
        """Initialise at random.

        Args:
            image_size: side of the pictures, at least 3.
            width: channels of the widest layer, at least 8.
        """
        super().__init__()
        self.image_size = image_size
        num_blocks = max(math.ceil(math.log2(image_size / 4)), 0)
        last_side = math.ceil(image_size / 2**num_blocks)
        channels = [min(width, max(64 * width // (4 << i), 8)) for i in range(num_blocks, -1, -1)]
        self.from_rgb = _Equalized(channels[0], 3, 1, 1, gain=math.sqrt(2))
        self.blocks = nn.Sequential(*map(_Block, channels, channels[1:]))
        self.conv = _Equalized(width, width + 1, 3, 3, gain=math.sqrt(2))
        self.hidden = _Equalized(width, width * last_side**2, gain=math.sqrt(2))
        self.out = _Equalized(1, width)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] → logits (B, 1) float32, higher for real.

        Raises:
            InputError: the pictures have another side than `image_size`.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(pictures.shape[1:]) != expected:
            raise InputError(f"pictures are {tuple(pictures.shape)}, this discriminator takes (B, *{expected})")
        x = self.blocks(_leaky_relu(self.from_rgb(pictures)))
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.out.weight.dtype)
            x = torch.cat((x, _group_deviation(x, self.group_size)), dim=1)
            x = _leaky_relu(self.conv(x, padding=1))
            return self.out(_leaky_relu(self.hidden(x.flatten(1))))

    @staticmethod
    def generator_loss(fake_logits: Tensor) -> Tensor:
        """Non-saturating: E[softplus(−D(fake))], in nats."""
        return F.softplus(-fake_logits).mean()

    @staticmethod
    def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """½·(E[softplus(−D(real))] + E[softplus(D(fake))]), in nats; ln 2 for one that knows nothing.

        The half is BSQ-ViT's; StyleGAN2 has none, so beside its loss the same γ of R1 weighs half as much.
        """
        return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


class PatchDiscriminator(nn.Module):
    """The 70×70 PatchGAN: one logit a patch; 2.8 M parameters at width 512.

    4×4 convolutions with strides 2, 2, 2, 1, 1 and width/8, width/4, width/2, width, 1 channels. The field has
    BatchNorm in it, which couples all samples of a rank and keeps running statistics. Here it is GroupNorm, which
    looks at one picture, in groups of 8 channels. (InstanceNorm would level each channel by itself, and so hide
    how strong high frequencies are beside low ones, which tells a blurred picture.) A logit sees 70×70 pixels, and
    the rest of the picture through these statistics alone.
    """

    group_size = 1

    def __init__(self, width: int = 512):
        """Initialise at random, the convolutions with std 0.02 as in pix2pix.

        Args:
            width: channels of the widest layer, a multiple of 32; 512 is pix2pix's 64 filters in the first layer.
        """
        super().__init__()
        channels = (width // 8, width // 4, width // 2, width)
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in zip(channels, channels[1:], (2, 2, 1), strict=False):
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(after // 8, after)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides from 24 → logits (B, 1, H//8 − 2, W//8 − 2) float32, higher for real."""
        return _float(self.layers(pictures))

    @staticmethod
    def generator_loss(fake_logits: Tensor) -> Tensor:
        """Hinge: −E[D(fake)]."""
        return -fake_logits.mean()

    @staticmethod
    def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """½·(E[max(0, 1 − D(real))] + E[max(0, 1 + D(fake))]), as VQGAN has it; 1 for one that knows nothing."""
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


class _Block(nn.Module):
    """(B, C, S, S) → (B, C', ⌈S/2⌉, ⌈S/2⌉): two convolutions beside a 1×1 one, blurred before each stride.

    The √2 after each leaky ReLU and the sum's 1/√2 stand in the layers' gains: the same, in fewer passes.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv1 = _Equalized(channels, channels, 3, 3, gain=math.sqrt(2))
        self.conv2 = _Equalized(out_channels, channels, 3, 3)
        self.skip = _Equalized(out_channels, channels, 1, 1, gain=math.sqrt(0.5), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        y = _leaky_relu(self.conv1(x, padding=1))
        y = _leaky_relu(self.conv2(_blur(y, padding=2), stride=2))
        return y + self.skip(_blur(x, padding=1, stride=2))


class _Equalized(nn.Module):
    """A convolution, or a linear layer where the kernel's sides are absent, with an equalised learning rate.

    The weight is N(0, 1), times gain/√fan_in where it is used, so that Adam, whose step has the same size whatever
    the gradient's, moves all layers equally fast (arXiv 1710.10196 section 4.1). The bias takes the gain too.
    """

    def __init__(self, *shape: int, gain: float = 1.0, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.gain = gain

    def forward(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        weight = self.weight * (self.gain / math.sqrt(self.weight[0].numel()))
        bias = None if self.bias is None else self.bias * self.gain
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, stride, padding)


def _float(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Each channel convolved with [1, 3, 3, 1]ᵀ[1, 3, 3, 1]/64, zeros outside."""
    taps = torch.tensor([1, 3, 3, 1], dtype=x.dtype, device=x.device) / 8
    num_channels = x.shape[1]
    kernel = (taps[:, None] * taps).expand(num_channels, 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=num_channels)


def _group_deviation(x: Tensor, group_size: int) -> Tensor:
    """(B, C, H, W) → (B, 1, H, W): over its group a sample's standard deviation, averaged over all features."""
    num_whole = len(x) - len(x) % group_size
    groups = x[:num_whole].unflatten(0, (-1, group_size)), x[num_whole:][None]
    deviations = [
        (group.var(1, unbiased=False) + 1e-8).sqrt().flatten(1).mean(1).repeat_interleave(group.shape[1])
        for group in groups
        if group.numel()
    ]
    return torch.cat(deviations)[:, None, None, None].expand(-1, 1, *x.shape[2:])
