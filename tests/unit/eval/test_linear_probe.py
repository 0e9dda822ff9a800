import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from qlip.errors import InputError
from qlip.eval import linear_probe
from qlip.eval.batches import Columns, Pictures
from qlip.eval.linear_probe import (
    POSITIONS,
    cache_file,
    embed,
    factor,
    probe_accuracy,
    read_cache,
    train_probe,
    write_cache,
)
from qlip.eval.options import ProbeConfig


def clusters(count, seed, spread=0.3):
    """Columns of features around one place for each of four classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99)) * 5 + 20
    labels = torch.arange(count) % 4
    noise = torch.randn(2, count, 6, generator=generator) * spread
    values = {"cls": centres[labels] + noise[0], "patches": -centres[labels] + noise[1], "label": labels}
    return Columns(values, torch.zeros(count, 16, dtype=torch.uint8), [])


def test_separable_features_are_all_named_right():
    found = probe_accuracy(clusters(200, 0), clusters(80, 1), 4, ProbeConfig(batch_size=50), torch.device("cpu"))
    assert found.keys() == {f"{position}_top1" for position in POSITIONS}
    assert all(hits.tolist() == [1.0] * 80 for hits in found.values())


def test_both_uses_what_either_lacks():
    """CLS tells two pairs of classes apart, the patches the other two."""
    labels = torch.arange(200) % 4
    signs = torch.stack([labels % 2, labels // 2], 1) * 2.0 - 1
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 0.01
    values = {"cls": signs[:, :1] + noise[:, :1], "patches": signs[:, 1:] + noise[:, 1:], "label": labels}
    columns = Columns(values, torch.zeros(200, 16, dtype=torch.uint8), [])
    found = probe_accuracy(columns, columns, 4, ProbeConfig(batch_size=50), torch.device("cpu"))
    assert found["both_top1"].mean() == 1 and found["cls_top1"].mean() == found["patches_top1"].mean() == 0.5


def test_the_schedule_is_a_line_and_a_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = LinearLR(optimizer, 1 / 5, 1, total_iters=4), CosineAnnealingLR(optimizer, 20)
    schedule = SequentialLR(optimizer, parts, milestones=[5])
    for step in range(25):
        assert factor(step, 5, 20) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_the_probe_minimises_the_cross_entropy():
    """Steps of whole data with a small rate end where scipy's minimiser does."""
    columns = clusters(60, 2, spread=20)
    features, labels = (columns["cls"] - columns["cls"].mean(0)) / columns["cls"].std(0), columns["label"]
    probe = train_probe(features, labels, 4, ProbeConfig(lr=0.1, epochs=600, batch_size=60))
    x, y = features.double().numpy(), labels.numpy()

    def loss(flat):
        logits = x @ flat[:24].reshape(6, 4) + flat[24:]
        logits = logits - logits.max(1, keepdims=True)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(60), y])

    best = minimize(loss, np.zeros(28), method="BFGS").fun
    assert F.cross_entropy(probe(features), labels).item() == pytest.approx(best, abs=2e-3)


def test_features_are_those_before_the_quantizer(small_model, photos):
    samples = [{"image": p.read_bytes(), "label": i, "key": p.name} for i, p in enumerate(photos[:3])]
    columns = embed(small_model, Pictures(samples, small_model.image_processor, batch_size=2).batches())
    hidden = small_model.hidden_states(small_model.image_processor([p.read_bytes() for p in photos[:3]]))
    torch.testing.assert_close(columns["cls"], hidden[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(columns["patches"], hidden[:, 1:].mean(1), atol=1e-5, rtol=0)
    assert columns["label"].tolist() == [0, 1, 2]
    samples[1]["label"] = None
    with pytest.raises(InputError, match=f"{photos[1].name}: no label"):
        embed(small_model, Pictures(samples, small_model.image_processor).batches())


def test_features_are_kept(tmp_path, caplog):
    columns, about = clusters(8, 0), {"id_hash": "a", "data": "b"}
    path = cache_file(tmp_path, about)
    assert read_cache(path, about) is None
    write_cache(path, about, columns)
    found = read_cache(path, about)
    assert found is not None and found.values.keys() == columns.values.keys()
    assert all(found[name].equal(rows) for name, rows in columns.values.items())
    assert found.data_hash() == columns.data_hash()
    other = about | {"data": "c"}
    assert cache_file(tmp_path, other) != path and read_cache(path, other) is None
    path.write_bytes(path.read_bytes()[:100])  # cut off
    assert read_cache(path, about) is None and "written anew" in caplog.text


def test_ten_epochs_are_all_of_them_with_the_warm_up(monkeypatch):
    seen = []
    monkeypatch.setattr(linear_probe, "factor", lambda *steps: seen.append(steps) or factor(*steps))
    columns = clusters(20, 2, spread=20)
    train_probe(columns["cls"], columns["label"], 4, ProbeConfig(batch_size=10))
    assert len(seen) == 20 and seen[0][1:] == (2, 18)
    assert factor(*seen[1]) == 1 and factor(*seen[-1]) < 0.01
    with pytest.raises(InputError, match="warmup_epochs 3 must be less than epochs 3"):
        ProbeConfig(epochs=3, warmup_epochs=3)
