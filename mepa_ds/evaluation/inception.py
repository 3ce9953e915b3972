"""The network that FID is defined by: TensorFlow's Inception v3 of 2015, as torch-fidelity converted it.

torch-fidelity's network is used and nothing else of it: its formulas take their arguments in other orders in other
versions.

Shapes: B images, P = 2048 channels of the last pooling, S = 2023 spatial features (7 channels of 17 x 17), K = 1008
classes.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mepa_ds.errors import UserError
from mepa_ds.evaluation.space import INCEPTION, FeatureSpace
from mepa_ds.files import sha256_of_file
from mepa_ds.weights.state_dict_files import read_state_dict
from mepa_ds.weights.state_dicts import Wanted

SPATIAL, LOGITS = f"{INCEPTION}.spatial", f"{INCEPTION}.logits"
"""What the network gives beside the pooled features: for sFID, and (without the bias of the last layer) for the
inception score."""
POOL_WIDTH, SPATIAL_WIDTH = 2048, 2023

_SPATIAL_CHANNELS = 7
_CHUNK = {"cpu": 8}  # of 299 x 299 pixels each; 32 elsewhere
_PACKAGE = (0, 4)  # the oldest version of torch-fidelity whose network the tests check
_WANTED = Wanted("Inception v3", ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch1x1.conv.weight", "fc.weight"))
_INSTALL = "pip install 'mepa_ds[evaluation]'"
_OFFICIAL = "weights-inception-2015-12-05-6726825d.pth"


class Inception(FeatureSpace):
    """Inception v3, in fp32.

    Args:
        weights: torch-fidelity's conversion, `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        UserError: torch-fidelity is not installed or too old, or the weights are not this network's: before the first
            image.
    """

    def __init__(self, weights: Path, device: torch.device):
        self.name, self.width = INCEPTION, POOL_WIDTH
        self.preprocessing = "TensorFlow's bilinear resize to 299 x 299"
        self.chunk = _CHUNK.get(device.type, self.chunk)
        self._device = device
        self._network = _build(weights).to(device)
        self.identity = sha256_of_file(weights)
        self._spatial_BCHW: Tensor | None = None
        # mixed_6/conv:0 of the TensorFlow graph.
        branch = self._network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output_BCHW: Tensor) -> None:
        self._spatial_BCHW = output_BCHW[:, :_SPATIAL_CHANNELS]

    def _compute(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        pixels_B3HW = torch.tensor(pixels_BHW3).to(self._device).permute(0, 3, 1, 2)
        pool_BP, logits_BK = self._network(pixels_B3HW)
        assert self._spatial_BCHW is not None
        spatial_BS = self._spatial_BCHW.permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order
        return {INCEPTION: pool_BP, SPATIAL: spatial_BS, LOGITS: logits_BK}


def _build(weights: Path) -> nn.Module:
    network = _network_class()
    # The package would execute a pickle, or download one. It gets weights that were read safely, as a file in memory.
    memory = io.BytesIO()
    torch.save(read_state_dict(weights, wanted=_WANTED), memory)
    memory.seek(0)
    try:
        return network("inception", ["2048", "logits_unbiased"], memory)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{weights}: not the weights of Inception v3 ({line}); expected {_OFFICIAL}") from error


def _network_class() -> Callable[..., nn.Module]:
    """Raises UserError where torch-fidelity is missing, broken or too old."""
    try:
        version = str(importlib.import_module("torch_fidelity.version").__version__)
        found = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    except (ImportError, AttributeError) as error:
        raise UserError(f"this needs the package torch-fidelity ({error}): {_INSTALL}") from error
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _PACKAGE:
        raise UserError(f"torch-fidelity {version} is installed, but 0.4 or a newer one is needed: {_INSTALL}")
    return found  # type: ignore[no-any-return]
