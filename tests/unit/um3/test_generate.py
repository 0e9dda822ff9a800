"""Pictures are whole and of visual ids; tokens are those of an uncached, unbatched pass."""

from dataclasses import replace

import pytest
import torch
from tests.unit.um3.conftest import pictures, small_um3

from qlip.errors import InputError
from qlip.lm.generate import GREEDY, sample
from qlip.um3.layout import image_tokens, picture
from qlip.um3.model import PUBLISHED, UM3

CAPTIONS = ([5, 6, 7], [8], [9, 10, 11, 12, 13])


def test_the_rule_counts_a_picture_and_closes_it():
    rule = small_um3().config.image_ids
    drawn, none = [101, 117] * 6, torch.zeros(133, dtype=torch.bool)

    def allowed(*ids: int, images: bool = False) -> list[int]:
        return rule.allowed(torch.tensor([[1, *ids]]), images)[0].nonzero()[:, 0].tolist()

    assert none.shape == rule.allowed(torch.tensor([[1]]))[0].shape
    assert allowed() == allowed(5, 6) == list(range(99))
    assert allowed(images=True) == list(range(100))
    for i in range(12):
        assert allowed(99, *drawn[:i]) == list(range(101, 117) if i % 2 == 0 else range(117, 133))
    assert allowed(99, *drawn) == [100]
    assert allowed(99, *drawn, 100, 7) == list(range(99))
    both = rule.allowed(torch.tensor([[1, 1, 99, 101], [1, 99, 101, 117]]))  # rows are told apart
    assert both.sum(1).tolist() == [16, 16] and both[0, 117] and both[1, 101]


def by_hand(model: UM3, prompt: list[int], count: int, seed: int, guidance: float = 1.0) -> list[int]:
    noise = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    new: list[int] = []
    for i in range(count):
        ids = torch.tensor([prompt + new])
        scores = model.lm.logits(model.lm(ids))[:, -1]
        if guidance != 1:
            plain = model.lm.logits(model.lm(torch.tensor([[1, 99, *new]])))[:, -1]
            scores = plain + guidance * (scores - plain)
        slot = 101 + 16 * (i % 2)
        closed = torch.full_like(scores, -torch.inf)
        closed[:, slot : slot + 16] = scores[:, slot : slot + 16]
        new.append(int(sample(closed, PUBLISHED, noise[i : i + 1])))
    return new


@torch.no_grad()
@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_a_picture_is_drawn_from_its_slots_whatever_is_beside_it(guidance):
    model, seeds = small_um3(), [4, 5, 4]
    drawn = model.draw(CAPTIONS, replace(PUBLISHED, guidance_scale=guidance), seeds)
    assert drawn.shape == (3, 6)
    for caption, seed, row in zip(CAPTIONS, seeds, drawn, strict=True):
        expected = by_hand(model, [1, *caption, 99], 12, seed, guidance)
        assert torch.equal(image_tokens(torch.tensor(expected), model.config), row)


@torch.no_grad()
def test_captions_are_the_likeliest_words_up_to_the_end():
    model = small_um3()
    model.lm.head[2] *= 3  # so that some of them end
    tokens = pictures(5)
    captions = model.caption(tokens, max_tokens=20)
    assert len({tuple(caption) for caption in captions}) > 1 and min(map(len, captions)) < 20
    for row, caption in zip(tokens, captions, strict=True):
        ids, expected = [1, *picture(row, model.config)], []
        while len(expected) < 20:
            scores = model.lm.logits(model.lm(torch.tensor([ids + expected])))[0, -1]
            if (token := int(scores[:99].argmax())) == 2:
                break
            expected.append(token)
        assert caption == expected
    assert model.caption(tokens, max_tokens=20, sampling=PUBLISHED, seeds=range(5)) != captions


def test_pictures_that_the_model_begins_itself_are_whole():
    model = small_um3()
    with torch.no_grad():
        model.lm.head[99] *= 4
    ids = model.generate([[1, 5], [1, 6, 7]], 60, images=True)
    begun = 0
    for row in ids.tolist():
        for place in (i for i, token in enumerate(row) if token == 99 and i + 13 < len(row)):
            begun += 1
            assert image_tokens(torch.tensor(row[place + 1 : place + 13]), model.config).shape == (6,)
            assert row[place + 13] == 100
    assert begun
    assert all(99 not in row and max(row) < 99 for row in model.complete([[5], [6, 7]], max_tokens=60))


def test_the_context_bounds_what_is_written():
    model = small_um3(max_position_embeddings=20)
    assert len(model.complete([[5] * 10], GREEDY, max_tokens=50)[0]) <= 10
    with pytest.raises(InputError, match=r"a text has 21 ids, all that this model reads \(20\)"):
        model.complete([[5] * 20])
    with pytest.raises(InputError, match="has 8 ids, and 12 of a picture are to come.*shorten it to 7"):
        model.draw([[5] * 8])
