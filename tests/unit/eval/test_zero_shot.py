import pytest
import torch

from qlip.eval.batches import Pictures
from qlip.eval.zero_shot import classify, zero_shot


def samples(photos):
    return [{"image": photo.read_bytes(), "label": i % 3, "key": photo.name} for i, photo in enumerate(photos)]


def test_zero_shot_counts_what_classify_says(small_model, photos):
    names, templates = ["red square", "green square", "blue square"], ["a {}.", "{}"]
    data = samples(photos)
    results = zero_shot(small_model, data, names, templates)
    best = small_model.classify([s["image"] for s in data], names, templates).argmax(1)
    assert results["top1"] == pytest.approx(
        (best == torch.tensor([s["label"] for s in data])).float().mean().item()
    )
    assert results["top5"] == 1.0  # only three classes


def test_rows_are_whether_each_picture_is_named_right(small_model, photos):
    """Labels may stand elsewhere among more names."""
    names, place = [f"thing {i}" for i in range(8)], (5, 2, 7)
    data = samples(photos)
    pictures = Pictures(data, small_model.image_processor, batch_size=5)
    columns = classify(small_model, pictures.batches(), names, ["a {}."], lambda sample: place[sample["label"]])
    ranked = small_model.classify([s["image"] for s in data], names, ["a {}."]).argsort(1, descending=True)
    for k in (1, 5):
        expected = [float(place[i % 3] in ranked[i, :k]) for i in range(len(data))]
        assert columns[f"top{k}"].tolist() == expected
