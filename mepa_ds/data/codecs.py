"""How a teacher's feature map is stored: fp16, int8 with a scale a token, or PCA to k components and int8.

Shape legend: B batch, N patches, C teacher width, K principal components, X stored width (C, or K under PCA).
Alignment compares directions (cosine over channels), so the number to watch is the mean cosine between a decoded
token and the original; docs/data.md has it, with the bytes a sample, for every codec.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, identity_of_weights

FEATURES_EXT = "features.npy"
SCALE_EXT = "scale.npy"

_INT8_MAX = 127
_PCA_NAME = re.compile(r"pca([1-9][0-9]*)-int8")


@dataclass(frozen=True)
class PcaBasis:
    """Mean and orthonormal components of a teacher's features; one for a whole shard set."""

    mean: npt.NDArray[np.float32]  # (C,)
    components: npt.NDArray[np.float32]  # (K, C)

    @property
    def identity(self) -> str:
        return identity_of_weights({name: torch.from_numpy(array) for name, array in self._arrays().items()})

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            save_file(self._arrays(), temporary)

    @classmethod
    def load(cls, path: Path) -> PcaBasis:
        if not path.is_file():
            raise UserError(f"{path}: the shard set's PCA basis is missing; run the features precompute again")
        arrays = load_file(path)
        return cls(arrays["mean"], arrays["components"])

    def _arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        return {"mean": self.mean, "components": self.components}


@dataclass(frozen=True)
class FeatureCodec:
    """Turns features (..., C) float32 into named arrays and back. Made by `codec_named`."""

    name: str
    basis: PcaBasis | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that a sample has in a shard."""
        return (FEATURES_EXT,) if self.name == "fp16" else (FEATURES_EXT, SCALE_EXT)

    def encode(self, features: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        """(..., C) float32 -> `features.npy` (..., X) and, for int8, `scale.npy` (...) float32.

        int8 is symmetric: a token's largest magnitude becomes 127. Raises UserError for values that are not finite
        or that fp16 cannot hold.
        """
        if not np.isfinite(features).all():
            raise UserError("the teacher gave features that are not finite; are its weights whole, its input an image?")
        if self.name == "fp16":
            if np.abs(features).max(initial=0) > np.finfo(np.float16).max:
                raise UserError("features exceed what fp16 holds (65504); use --codec int8")
            return {FEATURES_EXT: features.astype(np.float16)}
        if self.basis is not None:
            features = (features - self.basis.mean) @ self.basis.components.T
        scale = np.abs(features).max(axis=-1) / np.float32(_INT8_MAX)
        levels = features / np.where(scale > 0, scale, 1)[..., None]
        return {FEATURES_EXT: np.rint(levels).astype(np.int8), SCALE_EXT: scale.astype(np.float32)}

    def decode(self, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """What `encode` stored -> (..., C) float32. For batches on a device see `FeatureDecoder`."""
        features = arrays[FEATURES_EXT].astype(np.float32)
        if self.name == "fp16":
            return features
        features *= arrays[SCALE_EXT].astype(np.float32)[..., None]
        if self.basis is not None:
            features = features @ self.basis.components + self.basis.mean
        return features

    def stored_width(self, width: int) -> int:
        """X: channels of `features.npy` for a teacher of `width` channels."""
        return width if self.basis is None else len(self.basis.components)


class FeatureDecoder(nn.Module):
    """The batched decoder that training uses: stored tensors -> (B, N, C) float32, on the device they are on."""

    mean: Tensor  # (C,)
    components: Tensor  # (K, C)

    def __init__(self, codec: FeatureCodec):
        super().__init__()
        self._has_basis = codec.basis is not None
        if codec.basis is not None:
            self.register_buffer("mean", torch.from_numpy(codec.basis.mean), persistent=False)
            self.register_buffer("components", torch.from_numpy(codec.basis.components), persistent=False)

    def forward(self, features_BNX: Tensor, scale_BN: Tensor | None = None) -> Tensor:
        features = features_BNX.float()
        if scale_BN is not None:
            features.mul_(scale_BN.unsqueeze(-1))
        if self._has_basis:
            features = features @ self.components + self.mean
        return features


def pca_components(name: str) -> int | None:
    """k of `pca<k>-int8`; None for the codecs without a basis. Raises UserError for an unknown codec."""
    if name in ("fp16", "int8"):
        return None
    if (match := _PCA_NAME.fullmatch(name)) is None:
        raise UserError(f"codec {name!r} is unknown; use fp16, int8 or pca<k>-int8 such as pca256-int8")
    return int(match.group(1))


def codec_named(name: str, basis: PcaBasis | None = None) -> FeatureCodec:
    """The codec of that name; `pca<k>-int8` needs its basis of k components."""
    components = pca_components(name)
    given = None if basis is None else len(basis.components)
    if components != given:
        raise UserError(f"codec {name!r} needs a basis of {components} components, got {given}")
    return FeatureCodec(name, basis)
