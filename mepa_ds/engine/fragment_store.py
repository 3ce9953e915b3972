"""Fragments to and from disk through torch.distributed.checkpoint (DCP).

Every parameter is stored as one flat tensor in as many chunks as ranks own a piece of it; DCP's own resharding
arithmetic then reads any other partition of it. Each rank writes and reads its own pieces only.
"""

from __future__ import annotations

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
    """Plans one chunk a fragment. The state dict that DCP passes around is {name: Fragment}."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, fragment in self.state_dict.items():
            offset, size = torch.Size([fragment.offset]), torch.Size([len(fragment.data)])
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offset, sizes=size),
                properties=TensorProperties.create_from_tensor(fragment.data),
                size=torch.Size([fragment.numel]),
            )
            items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].data


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into the fragments' own memory."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, fragment in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata) or stored.size.numel() != fragment.numel:
                found = "nothing" if stored is None else f"{getattr(stored, 'size', stored)}"
                raise UserError(f"the checkpoint has {found} for {name}, the run needs {fragment.numel} elements")
            chunk = ChunkStorageMetadata(torch.Size([fragment.offset]), torch.Size([len(fragment.data)]))
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


def save_fragments(fragments: Iterable[Fragment], directory: Path) -> None:
    """Writes every rank's fragments. Collective."""
    dcp.save(
        {fragment.name: fragment for fragment in fragments},
        storage_writer=dcp.FileSystemWriter(directory, sync_files=True),
        planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )


def load_fragments(fragments: Iterable[Fragment], directory: Path) -> None:
    """Fills every rank's fragments in place. Collective."""
    dcp.load(
        {fragment.name: fragment for fragment in fragments},
        storage_reader=dcp.FileSystemReader(directory),
        planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )


def read_whole(directory: Path, kind: str) -> dict[str, Tensor]:
    """All parameters of one kind as flat fp32 tensors, in one process and without any process group."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    whole = {
        name: Fragment(name, stored.size.numel(), 0, torch.empty(stored.size))
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(f"{kind}/") and isinstance(stored, TensorStorageMetadata)
    }
    dcp.load(
        dict(whole),
        storage_reader=dcp.FileSystemReader(directory),
        planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        no_dist=True,
    )
    return {name.removeprefix(f"{kind}/"): fragment.data for name, fragment in whole.items()}
