"""Batches of one size each, in an order that resumes."""

import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.data.buckets import Buckets, assign
from qlip.data.journal import Journal
from qlip.data.loader import TrainingSet, batches, order
from qlip.errors import InputError
from qlip.image_files import image_size
from qlip.model.image import read_image

SIZES = ((64, 64), (64, 96), (96, 64))


def encoded(width, height, format="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def some_buckets(count=100, seed=0):
    return Buckets(SIZES, np.random.default_rng(seed).choice(3, count, p=[0.5, 0.3, 0.2]))


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [
        (10, 10, 0),
        (100, 150, 1),
        (150, 100, 2),
        (1, 1000, 1),
        (1000, 1, 2),
        (640, 700, 0),
        (60, 80, 1),
        (64, 78, 0),
    ],
)
def test_the_nearest_aspect(height, width, bucket):
    """Between 1 and 1.5 the middle is 1.22."""
    assert assign([(height, width)], SIZES) == [bucket]


def test_of_two_as_near_the_first():
    assert assign([(2, 3)], [(32, 32), (64, 64), (64, 32)]) == [0]
    assert assign([], SIZES).shape == (0,)


def test_with_one_bucket_the_order_is_the_loaders():
    buckets = Buckets(((64, 64),), np.zeros(23, dtype=int))
    for start_step in (0, 3, 17):
        ours = islice(buckets.order(4, seed=5, start_step=start_step), 20)
        assert list(ours) == list(islice(order(23, 4, seed=5, start_step=start_step), 20))


def test_a_batch_is_of_one_bucket_and_an_epoch_has_a_sample_once():
    buckets = some_buckets()
    per_epoch = sum(n // 8 for n in np.bincount(buckets.bucket))
    batches = list(islice(buckets.order(8, seed=0), 3 * per_epoch))
    for batch in batches:
        assert len(batch) == 8 and len({buckets.size(i) for _, i in batch}) == 1
    for epoch in range(3):
        seen = [i for batch in batches for e, i in batch if e == epoch]
        assert len(seen) == len(set(seen)) == 8 * per_epoch
    used = {buckets.size(batch[0][1]) for batch in batches}
    assert used == set(SIZES)
    sizes = [buckets.size(batch[0][1]) for batch in batches[:per_epoch]]
    assert sizes != sorted(sizes)  # sizes take turns
    assert [i for _, i in batches[0]] != [i for _, i in batches[per_epoch]]


def test_it_goes_on_where_it_stopped():
    buckets = some_buckets()
    whole = list(islice(buckets.order(8, seed=3), 40))
    for start_step in (1, 10, 25):
        assert list(islice(buckets.order(8, seed=3, start_step=start_step), 40 - start_step)) == whole[start_step:]
    assert list(islice(buckets.order(8, seed=4), 40)) != whole


def test_a_bucket_that_fills_no_batch_is_named():
    buckets = Buckets(SIZES, np.array([0] * 20 + [2] * 3))
    with pytest.raises(InputError, match=r"the 3 samples of the bucket 96 x 64 .* batch of 4"):
        next(buckets.order(4, seed=0))
    assert len(next(buckets.order(3, seed=0))) == 3  # of 64 x 96 there is no sample
    with pytest.raises(InputError, match="the 0 samples"):
        next(Buckets(SIZES, np.array([], dtype=int)).order(4, seed=0))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))])
def test_the_size_of_a_picture_that_is_turned(format, orientation, size):
    picture = encoded(30, 20, format, exif=turned(orientation))
    assert image_size(picture) == size == read_image(picture).size[::-1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_measuring_reads_headers_alone(num_workers):
    wide = encoded(600, 400, "JPEG")
    samples = [{"image": data} for data in (wide, wide[:1000], encoded(20, 30), b"", b"no picture", encoded(9, 9))]
    buckets = Buckets.measure(samples, SIZES, num_workers)
    assert buckets.bucket.tolist() == [1, 1, 2, 0, 0, 0]
    assert buckets.size(0) == (64, 96) and buckets.size(2) == (96, 64)


def read_at(picture, rng, size=None):
    """A transform whose result tells the picture, the generator and the size."""
    height, width = read_image(picture).size[::-1]
    return torch.full((3, *size), float(height * width) + rng.random())


@pytest.fixture
def mixed():
    """60 pictures of three aspects, four of which cannot be read."""
    shapes = [(32, 32), (48, 32), (32, 48)]
    pictures = [encoded(*shapes[i % 3]) if i % 15 != 7 else b"damaged" for i in range(60)]
    samples = [{"image": picture, "key": str(i)} for i, picture in enumerate(pictures)]
    return TrainingSet(samples, read_at, None, 0, Buckets.measure(samples, SIZES))


def some_batches(dataset, count=20, **place):
    journal = Journal(dataset.samples, 0.5)
    return list(islice(batches(dataset, None, 8, journal=journal, **place), count))


def same(ours, theirs):
    return all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(ours, theirs, strict=True))


def test_batches_of_several_sizes(mixed):
    """The same with workers, after an interruption and over ranks. What replaces a damaged one has its size."""
    whole = some_batches(mixed)
    assert {tuple(batch["pixel_values"].shape) for batch in whole} == {(8, 3, *size) for size in SIZES}
    assert same(some_batches(mixed, num_workers=2), whole)
    assert same(some_batches(mixed, 13, start_step=7), whole[7:])
    ranks = [some_batches(mixed, rank=rank, world_size=2, num_parts=2) for rank in (0, 1)]
    joined = [
        {"pixel_values": torch.cat([part["pixel_values"] for part in parts])} for parts in zip(*ranks, strict=True)
    ]
    assert same(joined, whole)
