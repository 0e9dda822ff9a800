import json
import multiprocessing
from itertools import islice

import pytest
import torch

from qlip.data.captions import Captioner
from qlip.data.journal import Journal
from qlip.data.loader import TrainingSet, batches, order
from qlip.errors import InputError


def tokenize(texts):
    mask = torch.tensor([[1] * len(t) + [0] * (10 - len(t)) for t in texts])
    return mask * 5, mask


def transform(image, rng):
    if not image:
        raise InputError("the image of 0 bytes is empty")
    return torch.tensor([image[0], rng.random()])


def say(sample, rng):
    return sample.get("caption", "wagon")


def dataset(num=20, seed=3, words=("label",)):
    rows = [
        {"image": bytes([i]), "key": str(i), "caption": "ab" if i % 2 else "abc", "label": i % 4}
        for i in range(num)
    ]
    return TrainingSet([{k: row[k] for k in ("image", "key", *words)} for row in rows], transform, say, seed)


def test_every_sample_once_an_epoch_in_another_order():
    stream = order(20, 6, seed=1)
    epochs = [[next(stream) for _ in range(3)] for _ in range(2)]
    seen = [[i for batch in epoch for _, i in batch] for epoch in epochs]
    assert all(len(set(s)) == 18 for s in seen) and seen[0] != seen[1]
    assert {e for batch in epochs[1] for e, _ in batch} == {1}
    assert next(order(20, 6, seed=2)) != epochs[0][0]


@pytest.mark.parametrize("start", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("num_workers", (0, 1))
def test_a_resumed_stream_continues_the_first_one_exactly(start, num_workers):
    first = list(islice(batches(dataset(), tokenize, 6), 9))
    resumed = list(islice(batches(dataset(), tokenize, 6, start, num_workers), 9 - start))
    for a, b in zip(first[start:], resumed, strict=True):
        assert a["keys"] == b["keys"]
        assert torch.equal(a["pixel_values"], b["pixel_values"])  # augmentation included


def test_augmentation_differs_between_epochs_and_seeds():
    def draw(seed, epoch):
        return dataset(seed=seed)[(epoch, 4)]["pixel_values"][1].item()

    assert len({draw(0, 0), draw(0, 1), draw(1, 0)}) == 3
    assert draw(0, 1) == draw(0, 1)


def test_text_is_cut_to_the_longest_and_groups_follow_labels_or_captions():
    batch = next(batches(dataset(), tokenize, 8))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 5)
    assert batch["group"].tolist() == [int(k) % 4 for k in batch["keys"]]  # all say "wagon"
    for words in (("caption",), ("caption", "label")):
        batch = next(batches(dataset(words=words), tokenize, 8))
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 3)
        odd = torch.tensor([int(k) % 2 for k in batch["keys"]])
        same = batch["group"][:, None] == batch["group"][None]
        assert torch.equal(same, odd[:, None] == odd[None])


def test_samples_of_one_concept_are_one_group_whatever_their_captions():
    named = dataset(words=("caption",))
    for i, sample in enumerate(named.samples):
        sample |= {"caption": f"caption {i}", "concept": ("doughnut", "red apple", "tree")[i % 3]}
    batch = next(batches(named, tokenize, 8))
    concept = torch.tensor([int(k) % 3 for k in batch["keys"]])
    same = batch["group"][:, None] == batch["group"][None]
    assert torch.equal(same, concept[:, None] == concept[None])


@pytest.mark.parametrize("num_workers", (0, 1))
def test_a_bad_picture_is_named_on_one_line(num_workers):
    broken = dataset()
    broken.samples[7]["image"] = b""
    with pytest.raises(InputError, match="^7: the image of 0 bytes is empty; with it 1 of 20 samples") as raised:
        list(islice(batches(broken, tokenize, 20, num_workers=num_workers), 1))
    assert len(str(raised.value).splitlines()) == 1


def broken_dataset():
    """40 samples, of which 7 has no picture and 30 no words."""
    broken = dataset(40, words=("label", "caption"))
    broken.samples[7]["image"] = b""
    del broken.samples[30]["caption"]
    broken.caption = Captioner()
    return broken


def same(a, b):
    return a["keys"] == b["keys"] and torch.equal(a["pixel_values"], b["pixel_values"])


def test_another_sample_takes_the_place_of_one_that_cannot_be_used(tmp_path):
    """The same one for any workers, ranks and interruptions; all others stay where they are."""

    def made(start=0, num_workers=0, rank=0, world_size=1, folder=None):
        journal = Journal(broken_dataset().samples, 0.1, folder, rank, world_size)
        place = (start, num_workers, rank, world_size)
        return list(islice(batches(broken_dataset(), tokenize, 8, *place, journal=journal), 15 - start))

    whole = made(folder=tmp_path)
    planned = list(islice(order(40, 8, seed=3), 15))
    for batch, indices in zip(whole, planned, strict=True):
        for key, (_, i) in zip(batch["keys"], indices, strict=True):
            assert (key != str(i)) == (i in (7, 30))
    assert not {"7", "30"} & {key for batch in whole for key in batch["keys"]}
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted((entry["index"], entry["key"], entry["reason"]) for entry in listed) == [
        (7, "7", "the image of 0 bytes is empty"),
        (30, "30", "label 2 has no name: give a class-name file of at least 3 names"),
    ]
    assert all(map(same, whole, made(num_workers=2)))
    assert all(map(same, whole[7:], made(7, num_workers=1)))
    for rank in (0, 1):
        half = [batch | {"pixel_values": batch["pixel_values"][rank * 4 :][:4]} for batch in whole]
        half = [batch | {"keys": batch["keys"][rank * 4 :][:4]} for batch in half]
        assert all(map(same, half, made(rank=rank, world_size=2)))


def test_it_ends_once_too_many_cannot_be_used(tmp_path):
    journal = Journal(broken_dataset().samples, 0.04, tmp_path)  # one of 40
    with pytest.raises(InputError, match=r"2 of 40 samples cannot be used, listed in .*skipped\.jsonl, more than"):
        list(islice(batches(broken_dataset(), tokenize, 8, journal=journal), 15))
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2


def test_data_of_which_nothing_can_be_used_is_said_at_once():
    broken = dataset(200)
    broken.caption = Captioner()
    with pytest.raises(InputError, match=r"no name: give a class-name file.*100 samples in a row"):
        next(batches(broken, tokenize, 8, journal=Journal(broken.samples, 0.9)))


def test_two_ranks_share_out_whole_epochs():
    seen = [[], []]
    for rank in (0, 1):
        for batch in islice(batches(dataset(24), tokenize, 6, rank=rank, world_size=2), 4):
            seen[rank] += batch["keys"]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(map(int, seen[0] + seen[1])) == list(range(24))


def test_workers_of_a_fresh_interpreter():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = next(batches(dataset(), tokenize, 6, num_workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert torch.equal(spawned["pixel_values"], next(batches(dataset(), tokenize, 6))["pixel_values"])


def test_too_few_samples_for_a_batch():
    with pytest.raises(InputError, match="5 samples do not fill a batch of 6"):
        next(order(5, 6, seed=0))
