"""The quantizer against its formulas, written out in NumPy and float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from qlip.bits import codes_to_tokens, tokens_to_codes, tokens_to_sub_tokens
from qlip.model import QuantizerConfig
from qlip.model.layers import to_sphere
from qlip.model.quantizer import QuantizerMLP, entropies, group_tokens, quantize, quantizer_loss

LN2 = float(np.log(2))
FORMS = [(12, 1, 1.0), (12, 1, 100.0), (12, 6, 1.0), (12, 6, 100.0), (12, 12, 10.0), (28, 1, 1.0), (28, 7, 30.0)]
ENTROPY = 1e-5  # the worst case measured is 3e-6, of entropies up to 19 nats


def sphere(*shape, seed=0):
    return to_sphere(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def reference(u, group_size, inv_temperature):
    """docs/paper.md section 1, "Entropies": per-sample and codebook."""
    u = np.asarray(u, dtype=np.float64)
    width = u.shape[-1]
    u = u.reshape(-1, width)
    per_sample, codebook = 0.0, 0.0
    for start in range(0, width, group_size):
        logits = []
        for signs in itertools.product((-1.0, 1.0), repeat=group_size):
            score = sum(sign * u[:, start + i] for i, sign in enumerate(signs))
            logits.append(2 * inv_temperature / np.sqrt(width) * score)
        p = np.stack(logits, axis=1)
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        per_sample += np.mean([entropy(row) for row in p])
        codebook += entropy(p.mean(axis=0))
    return per_sample, codebook


def entropy(p):
    return -sum((x + 1e-8) * np.log(x + 1e-8) for x in p)


# Rounding


def test_codes_are_the_corners_and_zero_is_negative():
    latents = torch.tensor([[0.5, -0.5, 0.0, -0.0, 1e-20]])
    expected = torch.tensor([[1, -1, -1, -1, 1]]) * 5**-0.5
    assert torch.equal(quantize(latents), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_keep_dtype_shape_and_sign(dtype):
    latents = sphere(2, 9, 28).to(dtype)
    codes = quantize(latents)
    assert codes.dtype == dtype and codes.shape == latents.shape
    assert torch.equal(codes > 0, latents > 0)
    assert torch.equal(quantize(codes), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_are_those_of_their_tokens_to_the_bit(dtype):
    for width in range(1, 64):
        latents = sphere(3, 9, width).to(dtype)
        codes = quantize(latents)
        assert torch.equal(codes, tokens_to_codes(codes_to_tokens(latents), width, dtype)), width
        exact = torch.tensor(width**-0.5, dtype=torch.float64).to(dtype)
        assert torch.equal(codes.abs(), exact.expand_as(codes)), width


def test_the_gradient_passes_straight_through():
    latents, weight = sphere(2, 5, 12).requires_grad_(), torch.randn(2, 5, 12)
    codes = quantize(latents)
    torch.testing.assert_close(codes, quantize(latents.detach()), rtol=0, atol=1e-7)
    assert torch.equal(codes > 0, latents > 0)
    (codes * weight).sum().backward()
    assert torch.equal(latents.grad, weight)


@pytest.mark.parametrize("group_size", [1, 4, 7, 14, 28])
def test_group_tokens_are_sub_tokens(group_size):
    codes = quantize(sphere(2, 5, 28))
    sub_tokens = tokens_to_sub_tokens(codes_to_tokens(codes), 28, group_size)
    assert torch.equal(group_tokens(codes, group_size), sub_tokens)


# Entropies


@pytest.mark.parametrize(("width", "group_size", "inv_temperature"), FORMS)
def test_entropies(width, group_size, inv_temperature):
    latents = sphere(3, 7, width)
    per_sample, codebook = entropies(latents, group_size, inv_temperature)
    expected = reference(latents, group_size, inv_temperature)
    np.testing.assert_allclose([per_sample, codebook], expected, rtol=0, atol=ENTROPY)
    assert per_sample.dtype == codebook.dtype == torch.float32
    assert per_sample.shape == codebook.shape == ()


@pytest.mark.parametrize("inv_temperature", [1.0, 10.0, 100.0])
def test_groups_of_one_are_a_sigmoid_a_bit(inv_temperature):
    latents = sphere(3, 7, 28)
    p = torch.sigmoid(4 * inv_temperature * latents.double().view(-1, 28) * 28**-0.5)
    bits = torch.distributions.Bernoulli(probs=p).entropy().sum(-1).mean()
    mean = torch.distributions.Bernoulli(probs=p.mean(0)).entropy().sum()
    per_sample, codebook = entropies(latents, 1, inv_temperature)
    np.testing.assert_allclose([per_sample, codebook], [bits, mean], rtol=0, atol=ENTROPY)


def test_grouping_changes_the_codebook_entropy_only():
    """Within a token the bits are independent, so their entropies add; over tokens they need not be."""
    latents = sphere(4, 8, 12)
    alone, bound = entropies(latents, 1, 20.0)
    for group_size in (2, 3, 4, 6, 12):
        per_sample, codebook = entropies(latents, group_size, 20.0)
        torch.testing.assert_close(per_sample, alone, rtol=0, atol=1e-3)  # 2^12 times the 1e-8 in the formula
        assert per_sample <= codebook + 1e-3 and codebook <= bound + 1e-3


def test_limits_of_the_temperature():
    latents = quantize(sphere(1, 64, 12))
    flat, hard = entropies(latents, 6, 1e-6), entropies(latents, 6, 1e6)
    np.testing.assert_allclose(flat, [12 * LN2] * 2, atol=1e-5)
    counts = [torch.unique(ids, return_counts=True)[1] / 64 for ids in group_tokens(latents, 6)[0].T]
    np.testing.assert_allclose(hard, [0, sum(entropy(p.numpy()) for p in counts)], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inv_temperature", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("group_size", [1, 7])
def test_finite_in_any_dtype_and_temperature(dtype, inv_temperature, group_size):
    latents = torch.cat((sphere(1, 6, 28), torch.zeros(1, 1, 28), torch.eye(28)[:1, None]), dim=1)
    latents = latents.to(dtype).requires_grad_()
    per_sample, codebook = entropies(latents, group_size, inv_temperature)
    (per_sample - codebook).backward()
    assert per_sample.dtype == codebook.dtype == torch.float32
    assert torch.isfinite(torch.stack((per_sample, codebook))).all() and torch.isfinite(latents.grad).all()
    assert -1e-4 <= per_sample <= 28 * LN2 + 1e-3 and -1e-4 <= codebook <= 28 * LN2 + 1e-3


@pytest.mark.parametrize("group_size", [1, 7])
def test_float32_under_autocast(group_size):
    latents = sphere(2, 9, 28)
    plain = entropies(latents, group_size, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert entropies(latents, group_size, 50.0) == plain


@pytest.mark.parametrize(("width", "group_size", "inv_temperature"), [(6, 1, 1.0), (6, 3, 10.0), (6, 6, 3.0)])
def test_gradients_against_finite_differences(width, group_size, inv_temperature):
    latents, step = sphere(1, 4, width).double().numpy(), 1e-5
    for which in (0, 1):
        leaf = torch.tensor(latents, requires_grad=True)
        entropies(leaf, group_size, inv_temperature)[which].backward()
        expected = np.zeros_like(latents)
        for i in np.ndindex(latents.shape):
            moved = []
            for sign in (1, -1):
                u = latents.copy()
                u[i] += sign * step
                moved.append(reference(u, group_size, inv_temperature)[which])
            expected[i] = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(leaf.grad, expected, rtol=1e-4, atol=1e-6)


def test_groups_of_fourteen_of_28_bits_fit():
    """16,384 patterns a group: 8 MB here, where one group of 28 would take 2^28 patterns a token."""
    latents = sphere(1, 64, 28).requires_grad_()
    per_sample, codebook = entropies(latents, 14, 100.0)
    (per_sample - codebook).backward()
    torch.testing.assert_close(per_sample, entropies(latents, 1, 100.0)[0], rtol=0, atol=0.02)
    assert torch.isfinite(latents.grad).all()


# The loss


@pytest.mark.parametrize("form", ["group", "analytical"])
@pytest.mark.parametrize("inv_temperature", [1.0, 100.0])
def test_loss(form, inv_temperature):
    config = QuantizerConfig(12, 4, inv_temperature, 0.25, 0.7, 1.3, form)
    latents = sphere(2, 7, 12)
    u = latents.double().numpy()
    per_sample, codebook = reference(u, 4 if form == "group" else 1, inv_temperature)
    commitment = np.square(np.where(u > 0, 1, -1) / np.sqrt(12) - u).sum(-1).mean()
    expected = 0.25 * commitment + (0.7 * per_sample - 1.3 * codebook) / inv_temperature
    assert quantizer_loss(latents, config).item() == pytest.approx(expected, abs=ENTROPY)


def test_commitment_pulls_latents_to_their_codes():
    config = QuantizerConfig(12, gamma_0=0.0, gamma_1=0.0, beta=0.5)
    latents = sphere(2, 7, 12).requires_grad_()
    quantizer_loss(latents, config).backward()
    expected = 2 * 0.5 * (latents - quantize(latents)).detach() / 14
    torch.testing.assert_close(latents.grad, expected)


def test_without_beta_there_is_no_commitment():
    latents = sphere(2, 7, 12)
    config = QuantizerConfig(12, 4, 10.0)
    per_sample, codebook = entropies(latents, 4, 10.0)
    torch.testing.assert_close(quantizer_loss(latents, config), (per_sample - codebook) / 10)
    assert quantizer_loss(latents, replace(config, beta=1.0)) > quantizer_loss(latents, config)


def test_mlp_is_two_linears_with_an_exact_gelu():
    mlp, x = QuantizerMLP(6, 10, 4, "gelu"), torch.randn(2, 3, 6)
    expected = torch.nn.Sequential(mlp.c_fc, torch.nn.GELU(), mlp.c_proj)(x)
    assert torch.equal(mlp(x), expected)
