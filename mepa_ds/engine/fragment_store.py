"""Fragments to and from disk through torch.distributed.checkpoint (DCP).

Every parameter is stored as one flat tensor in as many chunks as ranks own a piece of it; DCP's own resharding
arithmetic then reads any other partition of it. Each rank writes and reads its own pieces only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mepa_ds.engine.fragments import Fragment
from mepa_ds.errors import UserError


class _SavePlanner(DefaultSavePlanner):
    """Plans one chunk a fragment; DCP itself sees plain 1-D tensors."""

    def __init__(self, fragments: dict[str, Fragment]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._fragments = fragments

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, fragment in self._fragments.items():
            data = TensorWriteData(
                chunk=_chunk(fragment),
                properties=TensorProperties.create_from_tensor(fragment.data),
                size=torch.Size([fragment.numel]),
            )
            index = MetadataIndex(name, data.chunk.offsets)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._fragments[index.fqn].data


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into the fragments' own memory."""

    def __init__(self, fragments: dict[str, Fragment]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._fragments = fragments

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, fragment in self._fragments.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata) or stored.size.numel() != fragment.numel:
                found = stored.size.numel() if isinstance(stored, TensorStorageMetadata) else 0
                raise UserError(f"the checkpoint has {found} elements of {name}, the run needs {fragment.numel}")
            items += create_read_items_for_chunk_list(name, stored, [_chunk(fragment)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._fragments[index.fqn].data


def _chunk(fragment: Fragment) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([fragment.offset]), torch.Size([len(fragment.data)]))


def save_fragments(fragments: Iterable[Fragment], directory: Path) -> None:
    """Writes every rank's fragments. Collective."""
    named = {fragment.name: fragment for fragment in fragments}
    dcp.save(
        {name: fragment.data for name, fragment in named.items()},
        storage_writer=dcp.FileSystemWriter(directory, sync_files=True),
        planner=_SavePlanner(named),
    )


def load_fragments(fragments: Iterable[Fragment], directory: Path, alone: bool = False) -> None:
    """Fills fragments in place. Collective, unless one process reads `alone`."""
    named = {fragment.name: fragment for fragment in fragments}
    dcp.load(
        {name: fragment.data for name, fragment in named.items()},
        storage_reader=dcp.FileSystemReader(directory),
        planner=_LoadPlanner(named),
        no_dist=alone,
    )


def read_whole(directory: Path, kind: str) -> dict[str, Tensor]:
    """All parameters of one kind as flat fp32 tensors, in one process and without any process group."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    whole = [
        Fragment(name, stored.size.numel(), 0, torch.empty(stored.size))
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(f"{kind}/") and isinstance(stored, TensorStorageMetadata)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what was asked for
        load_fragments(whole, directory, alone=True)
    return {fragment.name.removeprefix(f"{kind}/"): fragment.data for fragment in whole}
