"""FID's own network cannot be had in tests: what is tested is that nothing else passes for it."""

import sys
import types

import pytest
import torch

from qlip.errors import InputError
from qlip.eval import inception
from qlip.eval.inception import load_inception


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file that has FID's hash for once, in torch.hub's folder."""
    place = tmp_path / "checkpoints"
    place.mkdir()
    torch.save({"fc.weight": torch.ones(2, 2)}, place / inception.FILES[1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return place / inception.FILES[1]


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity's extractor as it is called: the first row of each picture is its features."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, path):
            super().__init__()
            assert features_list == ["2048"]
            self.weight = torch.nn.Parameter(torch.load(path, weights_only=True)["fc.weight"])

        def forward(self, pictures):
            return (pictures[:, 0, 0].float(),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_found_where_the_hub_has_it(weights, fidelity, monkeypatch):
    monkeypatch.setattr(inception, "HASH", "")
    network = load_inception()
    pictures = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    assert network.metric == "fid" and network(pictures).tolist() == [[0, 1], [12, 13]]


def test_other_weights_are_not_fids(weights, fidelity):
    with pytest.raises(InputError, match="SHA-256 begins with .* that of FID's Inception with 6726825d"):
        load_inception(weights)


def test_a_pickle_that_is_more_than_tensors_is_never_loaded(weights, fidelity, monkeypatch):
    monkeypatch.setattr(inception, "HASH", "")
    torch.save({"fc.weight": print}, weights)
    with pytest.raises(InputError, match="cannot be read"):
        load_inception(weights)


def test_what_is_lacking_is_said(weights, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[pretrained-metrics\]'"):
        load_inception()
    weights.unlink()
    with pytest.raises(InputError, match=f"into {weights.parent}"):
        load_inception()
