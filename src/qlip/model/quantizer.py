"""Binary spherical quantization (BSQ): latents on the unit sphere, codes at the corners of a cube in it.

A latent u of L dimensions is rounded to û = sign(u)/√L, one of 2^L codes that need no table. Gradients
pass straight through. Two entropies train it: low per token (confident), high over the batch (all codes
used). docs/paper.md section 1, "The exact statements"; Zhao et al. 2024 (arXiv 2406.07548).
"""

import itertools

import torch
from torch import Tensor, nn

from qlip.bits import pack
from qlip.model.config import QuantizerConfig
from qlip.model.layers import activation


def quantize(latents: Tensor) -> Tensor:
    """Round latents to codes, straight-through.

    Args:
        latents: (..., L) unit vectors.

    Returns:
        (..., L) of ±1/√L, zero counting as negative, to the bit those of `qlip.bits.tokens_to_codes` where no
        gradient is asked for; the gradient is that of `latents`.
    """
    signs = torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
    codes = signs * latents.shape[-1] ** -0.5
    return latents + (codes - latents).detach() if latents.requires_grad else codes


def group_tokens(codes: Tensor, group_size: int) -> Tensor:
    """(..., L) codes → (..., L/group_size) int64, the id of each group of bits."""
    return pack(codes.unflatten(-1, (-1, group_size)) > 0)


def soft_assignment(latents: Tensor, group_size: int = 1, inv_temperature: float = 1.0) -> Tensor:
    """Probabilities of the codes, as if latents were rounded at random, in float32.

    The L dimensions are split into L/h groups; within one, the probability of each of the 2^h sign
    patterns c is softmax((2τ/√L)·⟨u_g, c⟩). With h = 1 this is σ(4τu/√L) a bit, the factorised form.
    Memory is O(tokens · L/h · 2^h).

    Args:
        latents: (..., L) unit vectors.
        group_size: h; divides L.
        inv_temperature: τ.

    Returns:
        (tokens, L/h, 2^h), each row a distribution.
    """
    num_bits = latents.shape[-1]
    with torch.autocast(latents.device.type, enabled=False):
        u = latents.float().reshape(-1, num_bits // group_size, group_size)
        patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=group_size)), device=u.device)
        return torch.softmax(2 * inv_temperature * num_bits**-0.5 * (u @ patterns.T), dim=-1)


def entropies(latents: Tensor, group_size: int = 1, inv_temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Entropies of the soft assignment of latents to codes, in nats, in float32.

    Args:
        latents: (..., L) unit vectors.
        group_size: h; divides L.
        inv_temperature: τ.

    Returns:
        per-sample entropy: mean over tokens of the sum over groups, in [0, L·ln 2];
        codebook entropy: of the mean probabilities over all tokens, summed over groups, in [0, L·ln 2].
    """
    p = soft_assignment(latents, group_size, inv_temperature)
    return _entropy(p).sum(-1).mean(), _entropy(p.mean(0)).sum()


def token_terms(latents: Tensor, config: QuantizerConfig) -> tuple[Tensor, Tensor]:
    """What each token on its own gives to the BSQ loss, and what it tells of the whole batch.

    Args:
        latents: (B, N, L) unit vectors.
        config: gives β, γ0, τ, the group size and the form of the entropies.

    Returns:
        β·commitment in code space + γ0·per-sample entropy/τ, (), a mean over tokens;
        (L/h, 2^h) mean probabilities, for `codebook_term`.
    """
    p = soft_assignment(latents, config.entropy_group_size, config.inv_temperature)
    loss = config.gamma_0 * _entropy(p).sum(-1).mean() / config.inv_temperature
    if config.beta:
        codes = quantize(latents.detach()).float()
        loss = loss + config.beta * (codes - latents.float()).square().sum(-1).mean()
    return loss, p.mean(0)


def codebook_term(mean_probabilities: Tensor, config: QuantizerConfig) -> Tensor:
    """−γ1·codebook entropy/τ, (), of the (L/h, 2^h) probabilities averaged over the whole batch."""
    return -config.gamma_1 * _entropy(mean_probabilities).sum() / config.inv_temperature


def quantizer_loss(latents: Tensor, config: QuantizerConfig) -> Tensor:
    """The BSQ loss: β·commitment in code space + (γ0·per-sample − γ1·codebook entropy)/τ.

    Args:
        latents: (B, N, L) unit vectors of the whole batch; `token_terms` and `codebook_term` are for parts of it.
        config: gives β, γ0, γ1, τ, the group size and the form of the entropies.

    Returns:
        () float32.
    """
    loss, mean_probabilities = token_terms(latents, config)
    return loss + codebook_term(mean_probabilities, config)


def _entropy(p: Tensor) -> Tensor:
    """(..., K) probabilities → (...) nats."""
    p = p + 1e-8
    return -(p * p.log()).sum(-1)


class QuantizerMLP(nn.Module):
    """Linear–GELU–Linear, on either side of the quantizer."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, hidden_act: str):
        super().__init__()
        self.hidden_act = hidden_act
        self.c_fc = nn.Linear(in_dim, hidden_dim)
        self.c_proj = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) → (..., out_dim)."""
        return self.c_proj(activation(self.c_fc(x), self.hidden_act))
