import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlip.train.losses import commitment_loss, contrastive_loss, pixel_mse


def test_infonce_equals_cross_entropy_with_the_diagonal():
    logits = torch.randn(7, 7)
    labels = torch.arange(7)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(logits), expected)
    torch.testing.assert_close(contrastive_loss(logits, torch.arange(7) + 100), expected)


def test_equal_captions_share_the_target_in_both_directions():
    logits = torch.randn(5, 5, dtype=torch.float64)
    group = [3, 8, 3, 1, 3]

    def one_direction(rows):
        total = 0.0
        for i, row in enumerate(rows):
            positives = [j for j in range(5) if group[j] == group[i]]
            log_p = row - np.log(np.exp(row).sum())
            total -= sum(log_p[j] for j in positives) / len(positives)
        return total / 5

    expected = (one_direction(logits.numpy()) + one_direction(logits.numpy().T)) / 2
    assert contrastive_loss(logits, torch.tensor(group)).item() == pytest.approx(expected, rel=1e-6)


def test_a_perfect_model_does_not_fight_itself_over_equal_captions():
    group = torch.tensor([0, 0, 1, 1])
    perfect = 50.0 * (group[:, None] == group[None]).float()
    assert contrastive_loss(perfect, group).item() == pytest.approx(
        np.log(2), abs=1e-4
    )  # shared by two: its floor
    logits = perfect.clone().requires_grad_()
    contrastive_loss(logits, group).backward()
    assert logits.grad.abs().max() < 1e-6


def test_pixel_mse_is_in_unit_pixels():
    std = torch.tensor([0.5, 0.25, 0.125])
    a, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    normalised = [(x - 0.4) / std[:, None, None] for x in (a, b)]
    torch.testing.assert_close(pixel_mse(*normalised, std), F.mse_loss(a, b))
    torch.testing.assert_close(pixel_mse(*normalised, torch.ones(3)), F.mse_loss(*normalised))


def test_commitment_moves_the_encoder_only():
    z, z_hat = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    loss = commitment_loss(z, z_hat)
    torch.testing.assert_close(loss, F.mse_loss(z, z_hat))
    loss.backward()
    assert z_hat.grad is None and z.grad is not None
