"""How a teacher's feature map is stored: fp16, int8 with one scale for each token, or k principal components in int8.

Shape legend: B batch, N patches, C teacher width, K principal components, X stored width (C, or K under PCA).
The alignment loss compares directions (cosine over channels), so a codec is judged by the mean cosine between a decoded
token and the original. docs/data.md has this number and the bytes of a sample for every codec.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mepa_ds.errors import UserError
from mepa_ds.weights.directories import write_safetensors

FEATURES_EXT = "features.npy"
SCALE_EXT = "scale.npy"
BASIS_NAME = "pca_basis.safetensors"
"""The file, beside the shards, that holds the PCA basis of a feature set."""

_INT8_MAX = 127
_PCA_NAME = re.compile(r"pca([1-9][0-9]*)-int8")


@dataclass(frozen=True)
class PcaBasis:
    """Mean and orthonormal components of a teacher's features; one for a whole shard set."""

    mean: Tensor  # (C,) float32
    components: Tensor  # (K, C) float32
    teacher: str
    """Identity of the teacher on whose features the basis was fitted."""

    def save(self, path: Path) -> None:
        write_safetensors(path, {"mean": self.mean, "components": self.components}, {"teacher": self.teacher})

    @classmethod
    def load(cls, path: Path) -> PcaBasis:
        if not path.is_file():
            raise UserError(f"{path}: the PCA basis of the shard set is missing; precompute the features again")
        try:
            with safe_open(path, framework="pt") as file:
                mean, components = file.get_tensor("mean"), file.get_tensor("components")
                teacher = file.metadata()["teacher"]
            if mean.dim() != 1 or components.dim() != 2 or components.shape[1] != len(mean):
                raise ValueError(f"shapes {tuple(mean.shape)} and {tuple(components.shape)} do not belong together")
            if mean.dtype != torch.float32 or components.dtype != torch.float32:
                raise ValueError(f"it holds {mean.dtype} and {components.dtype}, expected float32")
            return cls(mean, components, teacher)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: the PCA basis of the shard set cannot be read: {error}; precompute the features again"
            ) from error

    def to(self, device: torch.device | str) -> PcaBasis:
        return replace(self, mean=self.mean.to(device), components=self.components.to(device))


@dataclass(frozen=True)
class FeatureCodec:
    """Encodes any number of tokens at once, on the device they are on. Made by `codec_named`."""

    name: str
    basis: PcaBasis | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of the members that a sample has in a shard."""
        return (FEATURES_EXT,) if self.name == "fp16" else (FEATURES_EXT, SCALE_EXT)

    def encode(self, features: Tensor) -> dict[str, Tensor]:
        """(..., C) float32 -> `features.npy` (..., X) fp16 or int8 and, for int8, `scale.npy` (...) float32.

        int8 is symmetric: a token's largest magnitude becomes 127. Raises UserError for values that are not finite
        or that fp16 cannot hold.
        """
        if not features.isfinite().all():
            raise UserError("the teacher gave features that are not finite; are its weights whole?")
        if self.name == "fp16":
            halves = features.half()
            if not halves.isfinite().all():
                raise UserError("features exceed what fp16 holds (65504); use the codec int8")
            return {FEATURES_EXT: halves}
        if self.basis is not None:
            features = (features - self.basis.mean) @ self.basis.components.T
        scale = features.abs().amax(dim=-1) / _INT8_MAX
        levels = features / torch.where(scale > 0, scale, 1).unsqueeze(-1)
        return {FEATURES_EXT: levels.round_().to(torch.int8), SCALE_EXT: scale}


class FeatureDecoder(nn.Module):
    """Turns stored tensors into features, on the device where the tensors are (`.to(device)` moves the basis)."""

    mean: Tensor
    components: Tensor

    def __init__(self, codec: FeatureCodec):
        super().__init__()
        self._has_basis = codec.basis is not None
        if codec.basis is not None:
            self.register_buffer("mean", codec.basis.mean, persistent=False)
            self.register_buffer("components", codec.basis.components, persistent=False)

    def forward(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """`features.npy` (..., X) and, for int8, `scale.npy` (...) -> (..., C) float32."""
        features = features.float()
        if scale is not None:
            features.mul_(scale.unsqueeze(-1))
        return features @ self.components + self.mean if self._has_basis else features


def pca_components(name: str) -> int | None:
    """k of `pca<k>-int8`; None for the codecs without a basis. Raises UserError for an unknown codec."""
    if name in ("fp16", "int8"):
        return None
    if (match := _PCA_NAME.fullmatch(name)) is None:
        raise UserError(f"codec {name!r} is unknown; use fp16, int8 or pca<k>-int8 such as pca256-int8")
    return int(match.group(1))


def codec_named(name: str, basis: PcaBasis | None = None) -> FeatureCodec:
    """`fp16`, `int8`, or `pca<k>-int8` with its basis of k components.

    Raises UserError for an unknown name, or a basis that does not go with it.
    """
    wanted = pca_components(name)
    given = None if basis is None else len(basis.components)
    if wanted != given:
        raise UserError(f"codec {name!r} needs a PCA basis of {wanted} components, got {given}")
    return FeatureCodec(name, basis)
