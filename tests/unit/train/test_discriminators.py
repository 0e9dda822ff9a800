import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d
from torch import nn

from qlip.errors import InputError
from qlip.train.discriminators import (
    PatchDiscriminator,
    StyleDiscriminator,
    _blur,
    _Equalized,
    build_discriminator,
    r1_penalty,
)

BOTH = ("stylegan2", "patchgan")

# What StyleGAN2's own code prints of its 1024-pixel "config F" discriminator: conv0, conv1 and skip by side.
PUBLISHED_1024 = {
    1024: (9248, 18496, 2048),
    512: (36928, 73856, 8192),
    256: (147584, 295168, 32768),
    128: (590080, 1180160, 131072),
    64: (2359808, 2359808, 262144),
    32: (2359808, 2359808, 262144),
    16: (2359808, 2359808, 262144),
    8: (2359808, 2359808, 262144),
}
PUBLISHED_HEAD = 2364416 + 4194816 + 513


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Shapes and sizes


@pytest.mark.parametrize("image_size", [32, 64, 100, 256, 392])
def test_one_logit_a_picture_at_every_size(image_size):
    discriminator = build_discriminator("stylegan2", image_size, 32)
    logits = discriminator(pictures(2, 3, image_size, image_size))
    assert logits.shape == (2, 1) and logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in discriminator.parameters())


@pytest.mark.parametrize(("image_size", "side"), [(32, 2), (64, 6), (256, 30), (392, 47)])
def test_one_logit_a_patch(image_size, side):
    logits = build_discriminator("patchgan", image_size, 32)(pictures(2, 3, image_size, image_size))
    assert logits.shape == (2, 1, side, side) and logits.dtype == torch.float32


def test_odd_sides_lose_no_pixel():
    """392 halves to 49, 25, 13, 7: a discriminator that dropped the odd row would not see the last pixels."""
    x = pictures(1, 3, 392, 392).requires_grad_()
    build_discriminator("stylegan2", 392, 32)(x).sum().backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all()


def test_bad_settings_name_field_and_remedy():
    for arguments, words in {
        ("biggan", 64, 32): "adversary 'biggan'.*patchgan",
        ("stylegan2", 16, 32): "image_size is 16.*32",
        ("patchgan", 64, 48): "width is 48.*multiple of 32",
    }.items():
        with pytest.raises(InputError, match=words):
            build_discriminator(*arguments)
    with pytest.raises(InputError, match=r"\(2, 3, 32, 32\).*\(B, \*\(3, 64, 64\)\)"):
        build_discriminator("stylegan2", 64, 32)(pictures(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("image_size", "from_rgb", "total"), [(1024, 128, 29012513), (256, 512, 28864129), (64, 2048, 26488833)]
)
def test_the_style_discriminator_has_the_published_parameters(image_size, from_rgb, total):
    blocks = {side: counts for side, counts in PUBLISHED_1024.items() if side <= image_size}
    assert from_rgb + sum(map(sum, blocks.values())) + PUBLISHED_HEAD == total
    with torch.device("meta"):
        discriminator = build_discriminator("stylegan2", image_size)
    for block, counts in zip(discriminator.blocks, blocks.values(), strict=True):
        assert tuple(map(num_parameters, (block.conv1, block.conv2, block.skip))) == counts
    assert num_parameters(discriminator) == total


def test_the_patch_discriminator_has_the_published_parameters():
    filters = 64  # pix2pix's, three layers; BatchNorm and GroupNorm have equally many
    convolutions = (3 * filters + 2 * filters**2 + 8 * filters**2 + 32 * filters**2 + 8 * filters) * 16
    assert (
        num_parameters(PatchDiscriminator()) == convolutions + filters + 2 * (2 + 4 + 8) * filters + 1 == 2765633
    )


# The architecture, computed differently


def blurred(x: torch.Tensor, padding: int) -> torch.Tensor:
    taps = np.array([1, 3, 3, 1]) / 8
    padded = np.pad(x.detach().numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    flat = padded.reshape(-1, *padded.shape[2:])
    rows = np.stack([convolve2d(image, np.outer(taps, taps), mode="valid") for image in flat])
    return torch.from_numpy(rows).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("side", [7, 8])
def test_blur_equals_scipy(side):
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(_blur(x, padding=2), blurred(x, 2))
    torch.testing.assert_close(_blur(x, padding=1, stride=2), blurred(x, 1)[:, :, ::2, ::2])


def reference_logits(discriminator: StyleDiscriminator, x: torch.Tensor) -> torch.Tensor:
    """StyleGAN2's discriminator as its paper draws it, for a single group: every gain at its own place."""

    def conv(layer, x, padding=0, stride=1):
        fan_in = layer.weight[0].numel()
        return F.conv2d(x, layer.weight / math.sqrt(fan_in), layer.bias, padding=padding, stride=stride)

    def act(x):
        return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)

    x = act(conv(discriminator.from_rgb, x))
    for block in discriminator.blocks:
        y = act(conv(block.conv1, x, padding=1))
        y = act(conv(block.conv2, blurred(y, 2), stride=2))
        x = (y + conv(block.skip, blurred(x, 1)[:, :, ::2, ::2])) / math.sqrt(2)
    deviation = np.sqrt(x.detach().numpy().var(axis=0) + 1e-8).mean()
    x = torch.cat((x, torch.full_like(x[:, :1], deviation)), dim=1)
    x = act(conv(discriminator.conv, x, padding=1))
    hidden, out = discriminator.hidden, discriminator.out
    x = act(x.flatten(1) @ hidden.weight.T / math.sqrt(hidden.weight.shape[1]) + hidden.bias)
    return x @ out.weight.T / math.sqrt(out.weight.shape[1]) + out.bias


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_style_discriminator_equals_its_paper(batch):
    torch.manual_seed(0)
    discriminator = StyleDiscriminator(32, 32).double()
    for name, parameter in discriminator.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    x = pictures(batch, 3, 32, 32).double()
    expected = reference_logits(discriminator, x)
    torch.testing.assert_close(discriminator(x), expected)


@pytest.mark.parametrize(("shape", "gain"), [((64, 48, 3, 3), math.sqrt(2)), ((64, 512), 1.0)])
def test_equalised_layers_keep_the_scale(shape, gain):
    """Weights are N(0, 1) as Adam sees them; unit inputs come out with deviation `gain`, at any fan-in."""
    torch.manual_seed(0)
    layer = _Equalized(*shape, gain=gain)
    assert layer.weight.std().item() == pytest.approx(1, abs=0.02)
    x = torch.randn(64, *shape[1:])
    assert layer(x).std().item() == pytest.approx(gain, rel=0.05)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, gain * 64))


def test_a_patch_is_70_pixels_wide():
    discriminator = PatchDiscriminator(32)
    for i, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):  # through whose statistics a little of the whole picture comes in
            discriminator.layers[i] = nn.Identity()
    x = pictures(1, 3, 256, 256).requires_grad_()
    discriminator(x)[0, 0, 15, 15].backward()
    rows, columns = (x.grad.abs().sum((0, 1)).sum(d).nonzero().flatten() for d in (1, 0))
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == 70


# Samples and processes


@pytest.mark.parametrize(
    ("kind", "parts"), [("stylegan2", (4, 8)), ("stylegan2", (8, 4)), ("patchgan", (1, 5, 6))]
)
def test_a_batch_in_parts_gives_the_same_logits(kind, parts):
    torch.manual_seed(0)
    discriminator = build_discriminator(kind, 32, 32)
    assert all(part % discriminator.group_size == 0 for part in parts)
    x = pictures(sum(parts), 3, 32, 32)
    logits = torch.cat([discriminator(part) for part in x.split(parts)])
    torch.testing.assert_close(logits, discriminator(x), rtol=1e-5, atol=1e-5)


def test_the_style_discriminator_couples_groups_of_four_and_a_rest():
    x = pictures(10, 3, 32, 32).requires_grad_()
    logits = build_discriminator("stylegan2", 32, 32)(x)
    for i, group in ((0, range(4)), (5, range(4, 8)), (9, range(8, 10))):
        (gradient,) = torch.autograd.grad(logits[i, 0], x, retain_graph=True)
        assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == list(group)


@pytest.mark.parametrize("kind", BOTH)
def test_training_leaves_no_trace_but_in_parameters(kind):
    discriminator = build_discriminator(kind, 32, 32)
    assert not list(discriminator.buffers())
    x = pictures(4, 3, 32, 32)
    before = discriminator(x)
    discriminator(pictures(4, 3, 32, 32, seed=1))
    assert torch.equal(discriminator.eval()(x), before)


@pytest.mark.parametrize("kind", BOTH)
def test_torchs_seed_decides_the_weights(kind):
    def states(seed):
        torch.manual_seed(seed)
        return build_discriminator(kind, 32, 32).state_dict()

    first, second, other = states(1), states(1), states(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# Losses


def test_losses_equal_those_of_torch():
    real, fake = torch.randn(2, 7, 1, 3, 3) * 2
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    style, patch = StyleDiscriminator, PatchDiscriminator
    bce, hinge = F.binary_cross_entropy_with_logits, F.hinge_embedding_loss  # the hinge of −1 is max(0, 1 − x)
    torch.testing.assert_close(style.generator_loss(fake), bce(fake, ones))
    torch.testing.assert_close(style.discriminator_loss(real, fake), (bce(real, ones) + bce(fake, zeros)) / 2)
    torch.testing.assert_close(patch.generator_loss(fake), -fake.mean())
    torch.testing.assert_close(
        patch.discriminator_loss(real, fake), (hinge(real, -ones) + hinge(-fake, -ones)) / 2
    )


@pytest.mark.parametrize("discriminator", [StyleDiscriminator, PatchDiscriminator])
def test_losses_pull_the_logits_their_way(discriminator):
    real, fake = torch.zeros(2, 4, 1).requires_grad_().unbind()
    real_gradient, fake_gradient = torch.autograd.grad(discriminator.discriminator_loss(real, fake), (real, fake))
    assert (real_gradient < 0).all() and (fake_gradient > 0).all()
    assert (torch.autograd.grad(discriminator.generator_loss(fake), fake)[0] < 0).all()
    sure = torch.full((4, 1), 50.0)
    assert discriminator.discriminator_loss(sure, -sure) < 1e-6
    assert discriminator.generator_loss(-sure) == 50, "a generator that is found out still has a gradient"


@pytest.mark.parametrize("kind", BOTH)
def test_r1_is_the_squared_gradient(kind):
    discriminator = build_discriminator(kind, 32, 32)
    x = pictures(4, 3, 32, 32)
    gradient = torch.func.grad(lambda x: discriminator(x).sum())(x)
    squared_norms = torch.stack([g.norm() ** 2 for g in gradient])
    torch.testing.assert_close(r1_penalty(discriminator, x), 10 / 2 * 16 * squared_norms.mean())
    torch.testing.assert_close(r1_penalty(discriminator, x, gamma=3, interval=1), 3 / 2 * squared_norms.mean())


@pytest.mark.parametrize("kind", BOTH)
def test_r1_reaches_the_weights(kind):
    """Its gradient, the second derivative of the discriminator, against finite differences along a direction."""
    torch.manual_seed(0)
    discriminator = build_discriminator(kind, 32, 32).double()
    x = pictures(4, 3, 32, 32).double()
    parameters = list(discriminator.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    penalty = r1_penalty(discriminator, x)
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)  # none for the last bias
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    step, values = 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
        values.append(r1_penalty(discriminator, x).item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * step * d
    assert slope.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("kind", BOTH)
def test_under_bfloat16_autocast(kind):
    """Logits come out near float32's (over 20 seeds at worst 0.053 of their spread); R1 is float32's exactly."""
    torch.manual_seed(0)
    discriminator = build_discriminator(kind, 64, 32)
    x = F.interpolate(pictures(8, 3, 8, 8), 64, mode="bilinear")
    exact, penalty = discriminator(x), r1_penalty(discriminator, x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, autocast_penalty = discriminator(x), r1_penalty(discriminator, x)
    discriminator.generator_loss(logits).backward()
    assert logits.dtype == torch.float32 and autocast_penalty.dtype == torch.float32
    assert torch.equal(autocast_penalty, penalty)
    assert (logits - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("kind", BOTH)
def test_it_learns_to_tell_blurred_pictures(kind):
    torch.manual_seed(0)
    discriminator = build_discriminator(kind, 32, 32)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.95))

    def batch(seed):
        real = pictures(16, 3, 32, 32, seed=seed)
        return real, F.avg_pool2d(real, 3, stride=1, padding=1) * 2.5  # no darker, only smoother

    for step in range(25):
        real, fake = batch(step)
        loss = discriminator.discriminator_loss(discriminator(real), discriminator(fake))
        if step % 8 == 0:
            loss = loss + r1_penalty(discriminator, real, gamma=0.1, interval=8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = batch(1000)
    with torch.no_grad():
        real_logits, fake_logits = (discriminator(x).flatten(1).mean(1) for x in (real, fake))
    assert real_logits.min() > fake_logits.max()
