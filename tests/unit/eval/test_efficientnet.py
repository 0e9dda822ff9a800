import pytest
import torch

from qlip.errors import InputError
from qlip.eval.efficientnet import load_efficientnet
from qlip.eval.features import load_features

# What PyPI's efficientnet_lite_pytorch 0.1.0 gives with the same weights for `picture()`: the first logits, the
# greatest and its place.
EXPECTED = ([0.63423, 3.05705, -0.67028, -1.40957], 6.96009, 885)


def picture(size=224):
    """Waves of three colours."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [((x * f + y * g) / 40).sin() for f, g in ((1, 2), (3, 1), (2, -1))]
    return (torch.stack(waves) * 127 + 128).to(torch.uint8)[None]


@pytest.fixture(scope="module")
def network():
    return load_efficientnet()


def test_logits_are_those_of_another_implementation(network):
    logits = network.classify(picture())[0]
    first, greatest, place = EXPECTED
    assert logits.shape == (1000,) and int(logits.argmax()) == place
    assert logits[:4].tolist() == pytest.approx(first, abs=1e-4) and float(logits.max()) == pytest.approx(
        greatest, abs=1e-4
    )


def test_features_are_what_the_classifier_sees(network):
    features = network(picture())
    assert features.shape == (1, network.num_features) and not features.requires_grad
    torch.testing.assert_close(network._fc(features), network.classify(picture()))


def test_pictures_of_other_sizes_are_resized(network):
    """A picture twice as large shows the same."""
    large = picture().repeat_interleave(2, 2).repeat_interleave(2, 3)
    a, b = network.classify(large).softmax(1), network.classify(picture()).softmax(1)
    assert (a - b).abs().max() < 0.1


def test_wrong_pictures_and_weights_are_named(network, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="uint8"):
        network(torch.rand(1, 3, 224, 224))
    file = tmp_path / "weights.pth"
    for content in ({"a": torch.zeros(1)}, {"f": print}):  # others; a pickle that is no tensors
        torch.save(content, file)
        with pytest.raises(InputError, match="weights.pth: not EfficientNet-Lite0's weights"):
            load_efficientnet(file)
    monkeypatch.setattr("qlip.eval.efficientnet.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[eval\]'"):
        load_efficientnet()


def test_features_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cpu = torch.device("cpu")
    assert [f.metric for f in load_features(("auto",), cpu)] == ["fd_efficientnet_lite0"]
    assert load_features(("none",), cpu) == []
    with pytest.raises(InputError, match="FID has no weights"):
        load_features(("inception",), cpu)
    with pytest.raises(InputError, match="'resnet'"):
        load_features(("resnet",), cpu)
