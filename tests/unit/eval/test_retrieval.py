import pytest
import torch
from torchmetrics.retrieval import RetrievalRecall

from qlip.errors import InputError
from qlip.eval.batches import Pictures
from qlip.eval.retrieval import AT, embed_pairs, recalls


def unit(*shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_recall_equals_torchmetrics():
    """Its recall is a share of the right ones; with one right one a query that is whether it was found."""
    images, texts = unit(40, 8, seed=0), unit(40, 1, 8, seed=1)
    found = recalls(images, texts, torch.ones(40, dtype=torch.int64))
    similarities = images @ texts[:, 0].T
    for name, rows in (("image_to_text", similarities), ("text_to_image", similarities.T)):
        for k in AT:
            metric = RetrievalRecall(top_k=k)
            queries = torch.arange(40)[:, None].expand(40, 40)
            metric.update(rows.flatten(), torch.eye(40).bool().flatten(), indexes=queries.flatten())
            assert found[f"{name}_recall@{k}"].value == pytest.approx(metric.compute().item(), abs=1e-6)


def test_several_captions():
    """Any of a picture's captions will do, and each caption looks for its picture; in parts as in whole."""
    images, texts = unit(30, 6, seed=2), unit(30, 3, 6, seed=3)
    counts = torch.tensor([1, 2, 3] * 10)
    found = recalls(images, texts, counts)
    flat = [(i, texts[i, j]) for i in range(30) for j in range(counts[i])]
    for k in AT:
        hits = 0
        for i in range(30):
            best = sorted(range(len(flat)), key=lambda t: -float(images[i] @ flat[t][1]))[:k]
            hits += any(flat[t][0] == i for t in best)
        assert found[f"image_to_text_recall@{k}"].value == pytest.approx(hits / 30)
        hits = sum(i in (images @ text).topk(k).indices.tolist() for i, text in flat)
        assert found[f"text_to_image_recall@{k}"].value == pytest.approx(hits / len(flat))


def test_parts_are_as_the_whole(monkeypatch):
    pairs = unit(30, 6, seed=2), unit(30, 3, 6, seed=3), torch.tensor([1, 2, 3] * 10)
    whole = recalls(*pairs)
    monkeypatch.setattr("qlip.eval.retrieval.ROWS", 7)
    assert recalls(*pairs) == whole


def test_a_model_that_embeds_everything_alike_finds_nothing():
    same = unit(1, 8, seed=0).expand(50, 8)
    found = recalls(same, same[:, None], torch.ones(50, dtype=torch.int64))
    assert found["image_to_text_recall@1"].value == found["text_to_image_recall@1"].value == 1 / 50


def test_captions_are_embedded_beside_their_pictures(small_model, photos):
    captions = [["a photo of a red square."], ["red", "a green square"], ["blue", "grey", "a photo", "of"]]
    samples = [{"image": p.read_bytes(), "key": p.name, "captions": c} for p, c in zip(photos, captions)]  # noqa: B905
    samples[0] = samples[0] | {"caption": captions[0][0]}
    pictures = Pictures(samples, small_model.image_processor, batch_size=2)
    columns = embed_pairs(small_model, pictures.batches(), most_captions=3)
    assert columns["num_captions"].tolist() == [1, 2, 3]
    tokenizer = small_model.text_tokenizer
    for i, own in enumerate(captions):
        own = own[:3]
        expected = torch.stack([small_model.encode_text(tokenizer([c])[0])[0] for c in own])
        torch.testing.assert_close(columns["text_embeds"][i, : len(own)], expected, atol=1e-5, rtol=0)
        assert not columns["text_embeds"][i, len(own) :].any()
    expected = small_model.encode_image(small_model.image_processor([p.read_bytes() for p in photos[:3]]))
    torch.testing.assert_close(columns["image_embeds"], expected, atol=1e-5, rtol=0)
    del samples[1]["captions"]
    with pytest.raises(InputError, match=f"{photos[1].name}: no caption"):
        embed_pairs(small_model, pictures.batches())
