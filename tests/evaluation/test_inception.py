"""Inception's features against the layers that they are defined by, and torch-fidelity's versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from mepa_ds.errors import UserError
from mepa_ds.evaluation.inception import LOGITS, SPATIAL, Inception
from tests.evaluation.images import digits
from tests.evaluation.inception_weights import write_random_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_features_are_those_of_the_layers(weights: Path) -> None:
    """mixed_6/conv is the first branch of the block Mixed_6d; the spatial features are in TensorFlow's order."""
    inception = Inception(weights, torch.device("cpu"))
    inception.chunk = 3
    pixels_BHW3 = digits(0, 2)
    features = inception.outputs(pixels_BHW3)
    net = inception._network
    x = torch.tensor(pixels_BHW3).permute(0, 3, 1, 2).float()
    x = (interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False) - 128) / 128
    names = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    names += ["MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"]
    for name in names:
        x = net.get_submodule(name)(x)
    branch_BCHW = net.get_submodule("Mixed_6d.branch1x1")(x)
    assert branch_BCHW.shape[2:] == (17, 17)
    for y, x_, channel in ((0, 0, 0), (3, 11, 6), (16, 16, 5)):
        place = (y * 17 + x_) * 7 + channel
        torch.testing.assert_close(features[SPATIAL][:, place], branch_BCHW[:, channel, y, x_])
    assert features[SPATIAL].shape == (2, 2023)
    assert features["inception"].shape == (2, inception.width) == (2, 2048)
    torch.testing.assert_close(features[LOGITS], features["inception"] @ net.get_parameter("fc.weight").T)
    alone = inception.outputs(pixels_BHW3[1:])
    for name, rows in features.items():
        assert torch.equal(rows[1:], alone[name]), "whatever else is in the batch"
    assert inception(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 2048)


def test_a_package_that_does_not_do_is_told_first(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 0.4.0-beta of MAR's authors has the same network; its formulas, which have another order of arguments, are
    not used."""
    monkeypatch.setattr("torch_fidelity.version.__version__", "0.3.0")
    with pytest.raises(UserError, match=r"torch-fidelity 0\.3\.0 is installed, but 0\.4 or a newer one is needed: pip"):
        Inception(weights, torch.device("cpu"))
    monkeypatch.setattr("torch_fidelity.version.__version__", "0.4.0-beta")
    Inception(weights, torch.device("cpu"))
    monkeypatch.delattr("torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3")
    with pytest.raises(UserError, match=r"this needs the package torch-fidelity .*pip install"):
        Inception(weights, torch.device("cpu"))


def test_weights_of_something_else(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    for name, message in (("wrong.pth", "not the weights of Inception v3"), ("none.pth", "cannot read the weights")):
        with pytest.raises(UserError, match=message):
            Inception(tmp_path / name, torch.device("cpu"))
