import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipConfig, SiglipModel

from qlip.train.losses import commitment_loss, contrastive_loss, pixel_mse, sigmoid_loss


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


def test_the_sigmoid_loss_is_that_of_transformers():
    """Its value and the gradients of scale, bias and embeddings."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = tower | {"vocab_size": 50}, tower | {"image_size": 8, "patch_size": 4}
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    nn.init.constant_(siglip.logit_scale, math.log(10))
    nn.init.constant_(siglip.logit_bias, -10)
    ids, pixels = torch.randint(1, 50, (6, 5)), torch.randn(6, 3, 8, 8)
    out = siglip(input_ids=ids, pixel_values=pixels, return_loss=True)
    scale, bias = siglip.logit_scale.exp().squeeze(), siglip.logit_bias.squeeze()
    loss = sigmoid_loss(out.image_embeds, out.text_embeds, scale, bias)
    torch.testing.assert_close(loss, out.loss)
    parameters = [p for p in siglip.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, out.loss))
    torch.testing.assert_close(*gradients)


def test_in_the_sigmoid_loss_all_pairs_of_a_group_are_positive():
    images, texts = embeddings(5)
    group, expected = [3, 8, 3, 1, 3], 0.0
    for image, own in zip(images.detach().numpy(), group, strict=True):
        for words, other in zip(texts.detach().numpy(), group, strict=True):
            logit = 7 * image @ words - 2
            expected += np.log1p(np.exp(-logit if own == other else logit)) / 5
    loss = sigmoid_loss(images, texts, torch.tensor(7.0), torch.tensor(-2.0), torch.tensor(group))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def softmax(images, texts, scale, group=None, **settings):
    return contrastive_loss(images, texts, scale, group, **settings)


def sigmoid(images, texts, scale, group=None, **settings):
    """With the bias of scale 9 near −3, so that the scale's gradient is that of both."""
    return sigmoid_loss(images, texts, scale, -scale / 3, group, **settings)


@pytest.mark.parametrize("chunk_size", (1, 4, 5, 100))
@pytest.mark.parametrize("kind", (softmax, sigmoid))
def test_chunks_have_the_value_and_gradients_of_all_logits_at_once(kind, chunk_size):
    """12 rows: chunks of 1, of 4, of 5 with a rest of 2, and one of all."""
    results = []
    for size in (12, chunk_size):
        embeds, scale = embeddings(12), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        loss = kind(*embeds, scale, torch.arange(12) % 5, chunk_size=size)
        results.append((loss, *torch.autograd.grad(loss, (embeds, scale))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_size", (64, 512))
@pytest.mark.parametrize("kind", (softmax, sigmoid))
def test_never_more_than_a_chunk_of_logits_is_held(kind, chunk_size):
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
        kind(*embeds, torch.tensor(10.0), chunk_size=chunk_size).backward()
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
