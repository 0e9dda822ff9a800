import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlip.train.losses import commitment_loss, contrastive_loss, pixel_mse


def embeddings(size, dim=16, dtype=torch.float64):
    torch.manual_seed(0)
    return F.normalize(torch.randn(2, size, dim, dtype=dtype), dim=-1).requires_grad_()


def test_infonce_equals_cross_entropy_with_the_diagonal():
    images, texts = embeddings(7)
    logits, labels = 10 * images @ texts.T, torch.arange(7)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    scale = torch.tensor(10.0)
    torch.testing.assert_close(contrastive_loss(images, texts, scale), expected)
    torch.testing.assert_close(contrastive_loss(images, texts, scale, torch.arange(7) + 100), expected)


def test_equal_captions_share_the_target_in_both_directions():
    images, texts = embeddings(5)
    group = [3, 8, 3, 1, 3]

    def one_direction(rows):
        total = 0.0
        for i, row in enumerate(rows):
            positives = [j for j in range(5) if group[j] == group[i]]
            log_p = row - np.log(np.exp(row).sum())
            total -= sum(log_p[j] for j in positives) / len(positives)
        return total / 5

    logits = 7 * (images @ texts.T).detach().numpy()
    expected = (one_direction(logits) + one_direction(logits.T)) / 2
    loss = contrastive_loss(images, texts, torch.tensor(7.0), torch.tensor(group))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_perfect_model_does_not_fight_itself_over_equal_captions():
    group = torch.tensor([0, 0, 1, 1])
    perfect = F.one_hot(group, 2).float().requires_grad_()
    loss = contrastive_loss(perfect, perfect.detach(), torch.tensor(50.0), group)
    assert loss.item() == pytest.approx(np.log(2), abs=1e-4)  # shared by two: its floor
    loss.backward()
    assert perfect.grad.abs().max() < 1e-5


@pytest.mark.parametrize("chunk_size", (1, 4, 5, 100))
def test_chunks_have_the_value_and_gradients_of_all_logits_at_once(chunk_size):
    """12 rows: chunks of 1, of 4, of 5 with a rest of 2, and one of all."""
    results = []
    for size in (12, chunk_size):
        embeds, scale = embeddings(12), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(*embeds, scale, torch.arange(12) % 5, chunk_size=size)
        results.append((loss, *torch.autograd.grad(loss, (embeds, scale))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_size", (64, 512))
def test_never_more_than_a_chunk_of_logits_is_held(chunk_size):
    """Of all tensors that autograd saves or the loss makes, none is larger than a chunk's logits."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    embeds = embeddings(512, 8, torch.float32)
    with Sizes():
        contrastive_loss(*embeds, torch.tensor(10.0), chunk_size=chunk_size).backward()
    assert largest == chunk_size * 512


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
