"""Files of a teacher's features: found by the image's bytes, of use while they are incomplete, in batches."""

import dataclasses
import pickle
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.data.test_loader import dataset, tokenize

from qlip.data.loader import TrainingSet, batches
from qlip.data.teacher import Teacher, TeacherFiles, TeacherWriter, create_teacher_file, hash_image
from qlip.errors import InputError

TEACHER = Teacher("resnet", "abc", (64, 64), width=5, grid=(2, 3), grid_width=4)


def write(path, images, teacher=TEACHER, count=None):
    """A file of `count` rows, of which the last ones hold the images, the last image in the first of them."""
    count = count or len(images)
    create_teacher_file(path, teacher, count)
    torch.manual_seed(len(images))
    features = {"pooled": torch.randn(len(images), teacher.width)}
    if teacher.grid_width:
        features["grid"] = torch.randn(len(images), *teacher.grid, teacher.grid_width)
    rows = range(count - 1, count - len(images) - 1, -1)
    TeacherWriter(path).write(rows, [hash_image(image) for image in images], features)
    return features


def test_features_are_found_by_the_bytes_of_their_image(tmp_path):
    images = [bytes([i]) * 9 for i in range(7)]
    first = write(tmp_path / "a.safetensors", images[:3], count=6)
    second = write(tmp_path / "b.safetensors", images[3:6])
    files = TeacherFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert len(files) == 6 and files.teacher == TEACHER
    for i, image in enumerate(images[:6]):
        found, expected = files.find(image), first if i < 3 else second
        assert image in files and found.keys() == {"teacher/pooled", "teacher/grid"}
        for name, values in expected.items():
            assert torch.equal(found[f"teacher/{name}"], values[i % 3].half())
    unknown = files.find(images[6])
    assert images[6] not in files and unknown["teacher/grid"].shape == (2, 3, 4)
    assert not any(value.any() for value in unknown.values())
    assert len(pickle.dumps(files)) < 1000  # a worker opens the files, and gets no copy
    assert torch.equal(
        pickle.loads(pickle.dumps(files)).find(images[4])["teacher/pooled"], second["pooled"][1].half()
    )


def test_a_file_is_safetensors(tmp_path):
    features = write(tmp_path / "a.safetensors", [b"x", b"y"], count=3)
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["hashes"].tolist() == [0, hash_image(b"y"), hash_image(b"x")]
    assert torch.equal(tensors["grid"][1:].flip(0), features["grid"].half())


def test_files_that_do_not_fit_are_refused(tmp_path):
    names = [tmp_path / f"{name}.safetensors" for name in "abc"]
    write(names[0], [b"x"])
    write(names[1], [b"y"], dataclasses.replace(TEACHER, model_hash="other"))
    with pytest.raises(InputError, match="of different teachers"):
        TeacherFiles(names[:2])
    names[2].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"c.safetensors holds no teacher's features .*qlip features --vision"):
        TeacherFiles(names[2:])
    with pytest.raises(InputError, match="holds no teacher's features"):
        TeacherFiles([tmp_path / "missing.safetensors"])


@pytest.mark.parametrize("num_workers", (0, 2))
def test_a_batch_has_the_features_of_its_samples(tmp_path, num_workers):
    plain = dataset(20)
    features = write(tmp_path / "a.safetensors", [bytes([i]) for i in range(12)])
    files = TeacherFiles([tmp_path / "a.safetensors"])
    taught = TrainingSet(plain.samples, plain.transform, plain.caption, plain.seed, teacher=files)
    pairs = zip(batches(plain, tokenize, 6), batches(taught, tokenize, 6, num_workers=num_workers), strict=False)
    for before, batch in islice(pairs, 3):
        assert before["keys"] == batch["keys"] and torch.equal(before["pixel_values"], batch["pixel_values"])
        for key, pooled, grid in zip(batch["keys"], batch["teacher/pooled"], batch["teacher/grid"], strict=True):
            known = int(key) < 12
            assert torch.equal(pooled, features["pooled"][int(key)].half() if known else torch.zeros(5).half())
            assert grid.any() == known
