"""The precomputed sets that training reads: opened, and checked against each other.

Legend: L tokens over all scales, N teacher patches, C teacher width, X stored width, V views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mepa_ds.data.codecs import (
    BASIS_NAME,
    FEATURES_EXT,
    SCALE_EXT,
    FeatureDecoder,
    PcaBasis,
    codec_named,
    pca_components,
)
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import MadeBy, source_images
from mepa_ds.data.views import BOX_EXT, WHOLE, check_same_views
from mepa_ds.errors import UserError

TOKENS_EXT = "tokens.npy"
_MOST_SCALES, _LONGEST_SIDE = 64, 4096


@dataclass(frozen=True)
class TrainingSets:
    """A token set and, if semantic guidance is on, the feature set of the same images, checked against each other."""

    tokens: ShardSet
    features: ShardSet | None
    decoder: FeatureDecoder | None
    unique_images: int | None = None
    """How many samples of the set a run trains on; None: all."""

    @property
    def num_samples(self) -> int:
        """The samples of an epoch."""
        return len(self.tokens) if self.unique_images is None else self.unique_images

    @property
    def window(self) -> int | None:
        """Shards that are shuffled together; None, a true permutation, if all sets are local."""
        windows = [shards.window for shards in (self.tokens, self.features) if shards and shards.window]
        return min(windows, default=None)

    @property
    def caches(self) -> list[ShardCache]:
        """The caches of those sets that are remote."""
        return [shards.cache for shards in (self.tokens, self.features) if shards and shards.cache]

    @property
    def num_classes(self) -> int:
        """Number of classes of the token set; 0 when the set does not say."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; empty when the set does not say."""
        return self.tokens.index.classes

    @property
    def tokenizer(self) -> MadeBy:
        """The tokenizer that made the tokens: `.name`, `.identity`, `.settings`."""
        return self.tokens.index.made_by

    @property
    def scales(self) -> tuple[int, ...]:
        return _scales(self.tokens)

    @property
    def codebook_size(self) -> int:
        return _count(self.tokens, "codebook_size")

    @property
    def num_views(self) -> int:
        """How many views of an image a sample has token maps of."""
        shape = self.tokens.index.members[TOKENS_EXT].shape
        assert shape is not None
        return shape[0] if len(shape) == 2 else 1

    @property
    def teacher(self) -> MadeBy | None:
        """The teacher that made the features: `.name`, `.identity`, `.settings`."""
        return None if self.features is None else self.features.index.made_by

    @property
    def feature_width(self) -> int | None:
        """C, the width of decoded features."""
        return None if self.features is None else _count(self.features, "width")

    @property
    def whole_maps(self) -> bool:
        """Whether features are maps of whole images, to be read at the boxes of the token set's views."""
        return self.teacher is not None and self.teacher.settings.get("views") == WHOLE

    @property
    def feature_grid_side(self) -> int | None:
        """sqrt(N): cells along one side of the feature maps in a batch."""
        if self.features is None:
            return None
        if self.whole_maps:
            return _count(self.features, "grid_side")
        shape = self.features.index.members[FEATURES_EXT].shape
        assert shape is not None
        return math.isqrt(shape[-2])


def open_training_sets(tokens: Path, features: Path | None, key: str = "data.tokens") -> TrainingSets:
    """Opens and checks the sets; reads their indices only. `key` is the setting that gave the tokens, for messages.

    Raises:
        UserError: a set is missing or of another kind, or the two do not hold the same samples in the same order.
    """
    token_set = ShardSet(tokens, key)
    _check_kind(token_set, "tokens", TOKENS_EXT)
    length = sum(side * side for side in _scales(token_set))
    _count(token_set, "codebook_size")
    _check_array(token_set, TOKENS_EXT, "ui", (1, 2), length)
    if BOX_EXT in token_set.index.members:
        _check_array(token_set, BOX_EXT, "f", (2,), 4)
    if features is None:
        return TrainingSets(token_set, None, None)
    feature_set = ShardSet(features, "data.features")
    _check_kind(feature_set, "features", FEATURES_EXT)
    check_siblings(token_set, feature_set)
    check_same_views(token_set.index.made_by.settings, feature_set.index.made_by.settings, "data")
    codec, width = str(_setting(feature_set, "codec")), _count(feature_set, "width")
    components = pca_components(codec)
    basis = None if components is None else PcaBasis.load(features / BASIS_NAME)
    if basis is not None and len(basis.mean) != width:
        raise UserError(
            f"data.features: {features / BASIS_NAME} is of a teacher of width {len(basis.mean)}, the set's is {width}; "
            "precompute the features again"
        )
    whole = feature_set.index.made_by.settings.get("views") == WHOLE
    dimensions = (3, 4) if whole else (2, 3)
    _check_array(feature_set, FEATURES_EXT, "fi", dimensions, width if components is None else components)
    if whole:
        _count(feature_set, "grid_side")
    if SCALE_EXT in codec_named(codec, basis).extensions:
        _check_kind(feature_set, "features", SCALE_EXT)
        _check_array(feature_set, SCALE_EXT, "f", tuple(count - 1 for count in dimensions), None)
    return TrainingSets(token_set, feature_set, FeatureDecoder(codec_named(codec, basis)))


def _check_kind(shards: ShardSet, kind: str, extension: str) -> None:
    if shards.index.kind != kind or extension not in shards.index.members:
        raise UserError(
            f"{shards.what}: {shards.directory}: holds {shards.index.kind} ({', '.join(shards.index.members)}), not "
            f"{kind}; give the set that `mepa data precompute {kind}` made"
        )


def _check_array(shards: ShardSet, extension: str, kinds: str, dimensions: tuple[int, ...], width: int | None) -> None:
    """Raises UserError unless the members are arrays of a kind (NumPy's letters), of so many axes, the last so long."""
    member = shards.index.members[extension]
    shape = member.shape or ()
    right = member.dtype is not None and np.dtype(member.dtype).kind in kinds and len(shape) in dimensions
    if not right or 0 in shape or (width is not None and shape[-1] != width):
        raise UserError(
            f"{shards.what}: {shards.directory}: index.json says that members .{extension} are {member.dtype} "
            f"{member.shape}, which does not fit its settings; make the set again with mepa data precompute"
        )


def check_siblings(first: ShardSet, second: ShardSet) -> None:
    """Raises UserError unless both sets hold the same keys in the same order, made from the same images.

    Keys alone are not enough: build_shards.py names images by their place, whatever dataset they come from.
    """
    sources = {source_images(shards.index) for shards in (first, second)} - {None}
    if first.index.keys_sha256 != second.index.keys_sha256 or len(sources) > 1:
        raise UserError(
            f"{first.what} {first.directory} ({len(first)} samples) and {second.what} {second.directory} "
            f"({len(second)} samples) are not made from the same images in the same order; "
            "run mepa data precompute again for one of them, on the image set of the other"
        )


def _count(shards: ShardSet, name: str) -> int:
    """A setting that is a number from 1 up."""
    value = _setting(shards, name)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _wrong_setting(shards, name, value)
    return value


def _scales(shards: ShardSet) -> tuple[int, ...]:
    value = _setting(shards, "scales")
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) <= _MOST_SCALES
    if not is_list or any(type(side) is not int or not 0 < side <= _LONGEST_SIDE for side in value):
        raise _wrong_setting(shards, "scales", value)
    return tuple(value)


def _wrong_setting(shards: ShardSet, name: str, value: object) -> UserError:
    return UserError(
        f"{shards.what}: {shards.directory}: index.json says {name!r} is {str(value)[:80]}; make the set again with "
        f"mepa data precompute {shards.index.kind}"
    )


def _setting(shards: ShardSet, name: str) -> Any:
    try:
        return shards.index.made_by.settings[name]
    except KeyError:
        raise UserError(
            f"{shards.what}: {shards.directory}: index.json does not say {name!r} in made_by.settings; "
            f"make the set again with mepa data precompute {shards.index.kind}"
        ) from None
