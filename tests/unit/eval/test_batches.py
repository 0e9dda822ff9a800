import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.data.samples import BadSample
from qlip.errors import InputError
from qlip.eval.batches import Columns, Pictures, collect, gather
from qlip.model.image import ImageProcessor


class Samples(list):
    """Samples of which some cannot be read."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if isinstance(sample, str):
            raise BadSample(sample, "its picture cannot be read")
        return sample


def picture(seed, size=(40, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(count=7):
    return Samples({"image": picture(i), "key": f"{i}.png", "label": i} for i in range(count))


PROCESSOR = ImageProcessor(32, 32)


def look(pictures, numbers=None):
    """Columns of the mean of each picture and of its label."""

    def score(batch):
        labels = torch.tensor([sample["label"] for sample in batch.samples])
        return {"mean": batch.pictures.double().mean((1, 2, 3)), "label": labels}

    return collect(pictures.batches(numbers), score)


def test_pictures_are_what_the_processor_gives():
    (batch,) = Pictures(samples(3), PROCESSOR).batches()
    assert batch.samples == [{"key": f"{i}.png", "label": i} for i in range(3)]
    assert batch.pixel_values(PROCESSOR).equal(PROCESSOR([picture(i) for i in range(3)]))


def test_squashed_pictures_lose_nothing_but_their_aspect():
    pictures = Pictures(samples(1), ImageProcessor(32, (16, 32)), "squash")
    (batch,) = pictures.batches()
    expected = Image.open(io.BytesIO(picture(0))).resize((32, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(batch.pictures[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert pictures.describe()["pictures"].startswith("the whole picture to 16 × 32")
    cut = Pictures(samples(1), PROCESSOR).describe()
    assert (
        cut["resize"] == "crop" and cut["pictures"] == "the short side to 32 pixels, the middle 32 × 32, bicubic"
    )


def test_workers_give_the_same():
    pictures = Pictures(samples(), PROCESSOR, batch_size=2)
    pickle.loads(pickle.dumps(pictures))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for alone, worked in zip(pictures.batches(), pictures.batches(num_workers=2), strict=True):
        assert alone.pictures.equal(worked.pictures) and alone.samples == worked.samples
    assert torch.get_rng_state().equal(state)  # a training goes on as if nobody had looked


def test_some_of_the_samples_are_spread_evenly():
    columns = look(Pictures(samples(7), PROCESSOR, max_samples=3, batch_size=2))
    assert columns["label"].tolist() == [0, 2, 4] and len(columns) == 3
    assert len(look(Pictures(samples(7), PROCESSOR, max_samples=100))) == 7


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_shares_of_ranks_make_the_whole(ranks, monkeypatch):
    pictures = Pictures(samples(7), PROCESSOR, batch_size=2)
    parts = []
    monkeypatch.setattr("qlip.eval.batches.world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr("qlip.eval.batches.rank", lambda rank=rank: rank)
        parts.append(look(pictures, pictures.my_share()))
    monkeypatch.setattr("qlip.eval.batches.gather_objects", lambda part: parts)
    whole, joined = look(pictures), gather(parts[0])
    assert all(joined[name].equal(rows) for name, rows in whole.values.items())
    assert joined.data_hash() == whole.data_hash() and len(joined) == 7


def test_what_cannot_be_used_is_told_and_loses_nothing_else():
    data = samples(5)
    data[1], data[3] = "gone.png", data[3] | {"image": b"junk"}
    columns = look(Pictures(data, PROCESSOR, batch_size=2))
    assert columns["label"].tolist() == [0, 2, 4] and len(columns) == 3
    assert [fault.key for fault in columns.faults] == ["gone.png", "3.png"]
    assert "cannot be read as an image" in columns.faults[1].reason
    with pytest.raises(InputError, match=r"gone.png: its picture"):
        columns.means()


def test_a_batch_of_which_nothing_can_be_used():
    data = samples(4)
    data[2] = data[3] = "gone.png"
    assert look(Pictures(data, PROCESSOR, batch_size=2))["label"].tolist() == [0, 1]
    with pytest.raises(InputError, match=r"not one of 2 pictures can be used; the first: gone.png"):
        gather(look(Pictures(Samples(["gone.png"] * 2), PROCESSOR)))


def test_the_hash_is_of_keys_bytes_words_and_order():
    def hashed(data, **options):
        pictures = Pictures(data, PROCESSOR, **options)
        found = look(pictures)
        assert Columns({}, pictures.digests(range(len(pictures))), []).data_hash() == found.data_hash()
        return found.data_hash()

    data = samples(3)
    first = hashed(data)
    assert first == hashed(samples(3), batch_size=1) and len(first) == 16
    changed = [
        Samples(data[:2]),
        Samples(data[::-1]),
        Samples([data[0] | {"key": "other.png"}, *data[1:]]),
        Samples([data[0] | {"image": picture(9)}, *data[1:]]),
        Samples([data[0] | {"label": 9}, *data[1:]]),
        Samples([data[0] | {"caption": "a cat"}, *data[1:]]),
    ]
    assert len({first, *map(hashed, changed)}) == 7


def test_means_are_those_of_numbers():
    columns = Columns({"psnr": torch.tensor([1.0, 2.0]), "tokens": torch.ones(2, 4)}, torch.zeros(2, 16), [])
    assert columns.means() == {"psnr": 1.5}
