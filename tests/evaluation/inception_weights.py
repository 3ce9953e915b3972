"""Random weights of the official shapes for torch-fidelity's Inception v3."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Untrained(FeatureExtractorInceptionV3):
    def load_state_dict(self, *_: object, **__: object) -> None:
        """Keeps what the constructor has drawn."""


def random_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return _Untrained("inception", ["2048"], nothing).state_dict()


def write_random_weights(path: Path) -> Path:
    torch.save(random_weights(), path)
    return path
