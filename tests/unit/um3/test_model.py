"""Losses against plain cross-entropy, packed rows against each document alone, new weights against the base."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.unit.um3.conftest import SPECIAL, TOKENS, base, pictures, small_um3

from qlip.errors import InputError
from qlip.um3.config import UM3Config
from qlip.um3.layout import (
    image_to_text,
    image_tokens,
    picture,
    positions,
    text_document,
    text_to_image,
    visual_ids,
)
from qlip.um3.model import UM3, text_view


def documents(config: UM3Config) -> list[list[int]]:
    tokens = pictures(2)
    return [
        text_document([5, 6, 7, 8], config),
        image_to_text(tokens[0], [9, 10], config),
        text_to_image([11, 12, 13], tokens[1], config),
    ]


def packed(rows: list[list[list[int]]], length: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of documents to what `forward` takes."""
    ids, owners = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        flat = [(token, number) for number, document in enumerate(row, 1) for token in document]
        ids[i, : len(flat)], owners[i, : len(flat)] = torch.tensor(flat).T
    return ids, owners


def counts(rows: list[list[list[int]]], config: UM3Config) -> list[torch.Tensor]:
    targets = [token for row in rows for document in row for token in document[1:]]
    visual = sum(token >= config.num_text for token in targets)
    return [torch.tensor(len(targets) - visual), torch.tensor(visual)]


def test_layouts_are_those_of_the_page_and_ids_come_back():
    config, tokens = small_um3().config, pictures(4)
    ids = visual_ids(tokens, config)
    assert (config.num_text, config.num_visual, config.num_image_tokens) == (101, 32, 12)
    assert ids[0, :2].tolist() == [101 + int(tokens[0, 0]) // 16, 101 + 16 + int(tokens[0, 0]) % 16]
    assert torch.equal(image_tokens(ids, config), tokens)
    drawn, row = ids[0].tolist(), tokens[0]
    assert picture(row, config) == [99, *drawn, 100]
    assert text_document([7], config) == [1, 7, 2]
    assert image_to_text(row, [7], config) == [1, 99, *drawn, 100, 7, 2]
    assert text_to_image([7], row, config) == [1, 7, 99, *drawn, 100, 2]
    with pytest.raises(InputError, match="id 117 is not of slot 0"):
        image_tokens(ids[0].roll(1).index_fill(0, torch.tensor(0), 117), config)
    with pytest.raises(InputError, match=r"its grid is \(2, 3\)"):
        picture(row[:5], config)


def test_without_qk_norm_text_is_the_original_s_to_the_bit():
    llama, ids = base(), torch.randint(3, 99, (2, 20))
    for untie in (False, True):
        model = small_um3(qk_norm=False, untie=untie)
        hidden, expected = model.lm(ids), llama(ids)
        assert torch.equal(hidden, expected)
        assert torch.equal(F.linear(hidden, model.lm.head[:99]), llama.logits(expected))
        torch.testing.assert_close(text_view(model).logits(hidden)[..., :99], llama.logits(expected))


@pytest.mark.parametrize("tied", (True, False))
def test_new_rows_are_the_mean_and_noise(tied):
    language = {"tie_word_embeddings": tied}
    model, llama = small_um3(noise=0.1, language=language), base(**language)
    assert (model.lm.lm_head is None) == tied
    for new, old in ((model.lm.embed_tokens.weight, llama.embed_tokens.weight), (model.lm.head, llama.head)):
        assert torch.equal(new[:99], old) and len(new) == 133
        apart = (new[99:] - old.mean(0)) / old.std(0)
        assert 0.09 < apart.std() < 0.11 and apart.mean().abs() < 0.01
        assert torch.equal(apart[0] != apart[1], torch.ones(64, dtype=torch.bool))
    again, other = (
        UM3.from_llama(llama, model.config, noise=0.1, seed=seed).lm.embed_tokens.weight for seed in (0, 1)
    )
    assert torch.equal(again, model.lm.embed_tokens.weight) and not torch.equal(again, other)
    loose = small_um3(language=language, untie=True)
    assert loose.lm.lm_head is not None and torch.equal(loose.lm.head[:99], llama.head)


def test_calibrated_gains_change_the_pretrained_queries_and_keys_least():
    llama, batches = base(), [torch.randint(0, 99, (2, 30)), torch.randint(0, 99, (1, 10))]
    config = UM3Config.of(llama.config, **TOKENS, **SPECIAL)
    plain, calibrated = (UM3.from_llama(llama, config, calibration=given).lm for given in ((), batches))
    assert all(layer.self_attn.q_norm.weight.unique().tolist() == [1] for layer in plain.layers)
    attention = calibrated.layers[0].self_attn  # what it reads is what the base's first layer reads
    states = torch.cat([llama.layers[0].input_layernorm(llama.embed(ids)).flatten(0, 1) for ids in batches])
    for part in "qk":
        x = getattr(attention, f"{part}_proj")(states).view(-1, 16)
        normed = F.rms_norm(x, (16,))
        best = [torch.linalg.lstsq(normed[:, i : i + 1], x[:, i : i + 1]).solution.item() for i in range(16)]
        torch.testing.assert_close(getattr(attention, f"{part}_norm").weight, torch.tensor(best))
    ids = batches[0]
    far, near = ((model(ids) - llama(ids)).norm() / llama(ids).norm() for model in (plain, calibrated))
    assert near < far
    with pytest.raises(InputError, match="calibration is for QK-norm"):
        UM3.from_llama(llama, replace(config, lm=replace(config.lm, qk_norm=False)), calibration=batches)


@pytest.mark.parametrize("softmax", ("separate", "joint"))
def test_losses_are_plain_cross_entropy_over_the_two_vocabularies(softmax):
    model = small_um3(softmax=softmax)
    rows = [[document] for document in documents(model.config)]
    losses = model(*packed(rows), *counts(rows, model.config))
    text, visual = [], []
    for (document,) in rows:
        ids = torch.tensor(document)
        for logits, target in zip(model.lm.logits(model.lm(ids[None, :-1]))[0], ids[1:], strict=True):
            if softmax == "joint":
                (text if target < 101 else visual).append(F.cross_entropy(logits, target))
            elif target < 101:
                text.append(F.cross_entropy(logits[:101], target))
            else:
                visual.append(F.cross_entropy(logits[101:], target - 101))
    assert (len(text), len(visual)) == (5 + 5 + 6, 24)
    torch.testing.assert_close(losses.text_loss, torch.stack(text).mean())
    torch.testing.assert_close(losses.visual_loss, torch.stack(visual).mean())
    torch.testing.assert_close(losses.loss, losses.text_loss + losses.visual_loss)


def test_packed_rows_are_each_document_alone_gradients_included():
    """One row of three documents and padding; the worst gradient differs by 2e-6 where the largest are about 5."""
    model = small_um3().train()
    three = documents(model.config)
    number = counts([three], model.config)
    assert positions(torch.tensor([[1, 1, 1, 2, 2, 0, 0]])).tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    together = model(*packed([three]), *number)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(*packed([[document]], len(document)), *number) for document in three]
    torch.testing.assert_close(sum(losses.loss for losses in alone), together.loss)
    sum(losses.loss for losses in alone).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_kind_that_is_absent_adds_nothing():
    model = small_um3()
    rows = [[text_document([5, 6, 7], model.config)]]
    losses = model(*packed(rows), *counts(rows, model.config))
    assert losses.visual_loss == 0 and torch.equal(losses.loss, losses.text_loss)
    losses.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.lm.head.grad[101:].any()


def test_configs_that_do_not_fit_are_refused():
    llama = base()
    of = lambda **changes: UM3Config.of(llama.config, **TOKENS | SPECIAL | changes)  # noqa: E731
    with pytest.raises(InputError, match="bits 3 does not divide"):
        of(bits=3)
    with pytest.raises(InputError, match="a picture takes 16 ids .* more than max_position_embeddings 15"):
        of(max_position_embeddings=15)
    with pytest.raises(InputError, match="need ids of their own"):
        of(eoi=99)
    with pytest.raises(InputError, match="lacks bos_token_id"):
        UM3Config.of(replace(llama.config, bos_token_id=None), **TOKENS, **SPECIAL)
    with pytest.raises(InputError, match="not of this language model"):
        UM3.from_llama(base(num_hidden_layers=2), of())
