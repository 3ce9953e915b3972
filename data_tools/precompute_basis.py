"""The PCA basis of a feature set in the codec `pca<k>-int8`: one basis for all shards of the set.

Shape legend: N tokens, C teacher width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from mepa_ds import distributed
from mepa_ds.data.codecs import BASIS_NAME, PcaBasis
from mepa_ds.data.shards.writer import ShardWriter
from mepa_ds.errors import UserError
from mepa_ds.progress import Progress
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.pca import RunningCovariance


def shared_basis(
    writer: ShardWriter, components: int, teacher: Teacher, features: Iterable[Tensor], num_blocks: int
) -> PcaBasis:
    """The set's basis, fitted on `features` (`num_blocks` blocks of (..., C)) if there is none yet.

    If several processes write the set, the first one that has fitted a basis decides for all.

    Raises:
        UserError: the basis is of another teacher, or is missing although shards that need it are there.
    """
    path = writer.directory / BASIS_NAME
    any_shard = len(writer.missing()) < len(
        writer.manifest.shard_names
    )  # asked first: a shard is written after its basis
    if not path.exists():
        if any_shard:
            raise UserError(f"{path}: lost, and the shards cannot be read without it; remove the set and make it again")
        quiet = not distributed.read_launch().is_main
        own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        _fit(Progress(features, f"PCA to {components}", num_blocks, disable=quiet), components, teacher).save(own)
        try:
            os.link(own, path)  # fails, unlike a rename, if another process was first
        except FileExistsError:
            pass
        finally:
            own.unlink()
    basis = PcaBasis.load(path)
    if basis.teacher != teacher.identity:
        raise UserError(f"{path}: fitted on another teacher's features; remove it, or write to another directory")
    return basis


def _fit(features: Iterable[Tensor], components: int, teacher: Teacher) -> PcaBasis:
    covariance = RunningCovariance(teacher.width)
    for block in features:
        covariance.add(block.reshape(-1, teacher.width))
    mean_C, components_KC, _ = covariance.principal_components(components)
    return PcaBasis(mean_C, components_KC, teacher.identity)
