"""Writes and reads fragments through torch.distributed.checkpoint (DCP).

Every parameter is stored as one flat tensor, with one chunk for each rank that owns a piece of it. DCP's own resharding
arithmetic can then read any other partition. Each rank writes and reads only its own pieces.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mepa_ds.checkpoint.fragment import Fragment, WriteError
from mepa_ds.checkpoint.progress import current_listener
from mepa_ds.checkpoint.stored.elements import read_elements
from mepa_ds.checkpoint.stored.table import read_table
from mepa_ds.errors import UserError
from mepa_ds.safety.places import open_no_link


class _SavePlanner(DefaultSavePlanner):
    """Plans one chunk per fragment; DCP itself sees plain 1-D tensors."""

    def __init__(self, fragments: dict[str, Fragment]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._fragments, self._note_progress = fragments, current_listener()

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
        self._note_progress()  # DCP looks up and writes one tensor after the other
        # DCP copies a tensor that is part of a larger storage, and keeps all copies until the end. A detour through
        # NumPy gives the same memory its own storage, which avoids the copy.
        return torch.from_numpy(self._fragments[index.fqn].data.numpy())


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into the fragments' own memory."""

    def __init__(self, fragments: dict[str, Fragment]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._fragments, self._note_progress = fragments, current_listener()

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
        self._note_progress()
        return self._fragments[index.fqn].data


def _chunk(fragment: Fragment) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([fragment.offset]), torch.Size([len(fragment.data)]))


class _Writer(dcp.FileSystemWriter):
    """Reports a full disk as such; torch.save would report a wrong position in its file instead."""

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from error


class _Reader(dcp.FileSystemReader):
    """Reads the bytes of tensors, and nothing else of what a checkpoint's files hold: no pickle is loaded."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_table(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = Path(self.path) / name
            with open(open_no_link(path, os.O_RDONLY), "rb") as file:
                for item in items:
                    place = self.storage_data[item.storage_index]
                    try:
                        read_elements(file, place.offset, place.length, item, planner.resolve_tensor(item).detach())
                    except ValueError as error:
                        raise UserError(f"{path}: cannot be read: {item.storage_index.fqn}: {error}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done


def save_fragments(fragments: Iterable[Fragment], directory: Path, group: dist.ProcessGroup) -> None:
    """Writes every rank's fragments and fsyncs them. Collective over `group`, a CPU group of all ranks.

    Raises:
        WriteError: on every rank, when a rank could not write.
    """
    named = {fragment.name: fragment for fragment in fragments}
    try:
        dcp.save(
            {name: fragment.data for name, fragment in named.items()},
            # No copying ahead: the tensors are on the CPU, but DCP would still wait for a stream of the current GPU.
            storage_writer=_Writer(directory, sync_files=True, per_thread_copy_ahead=0),
            planner=_SavePlanner(named),
            process_group=group,
        )
    except CheckpointException as error:  # a BaseException that holds the error of each rank
        rank, (cause, _) = next(iter(error.failures.items()))
        raise WriteError(f"rank {rank}: {type(cause).__name__}: {cause}") from cause


def load_fragments(fragments: Iterable[Fragment], directory: Path, alone: bool = False) -> None:
    """Fills fragments in place. Collective, unless one process reads `alone`.

    Raises the same UserError on every rank for files that cannot be read or that hold other tensors.
    """
    named = {fragment.name: fragment for fragment in fragments}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
            dcp.load(
                {name: fragment.data for name, fragment in named.items()},
                storage_reader=_Reader(directory),
                planner=_LoadPlanner(named),
                no_dist=alone,
            )
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, UserError):
            raise UserError(f"{directory}: {cause}", agreed=True) from cause
        if isinstance(cause, OSError):
            raise UserError(f"{directory}: cannot be read: rank {rank}: {cause}", agreed=True) from cause
        raise RuntimeError(f"{directory}: cannot be loaded: rank {rank}: {type(cause).__name__}: {cause}") from cause


def stored_tensors(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Returns name -> size and type of every tensor in a checkpoint."""
    stored = read_table(directory).state_dict_metadata
    return {name: item for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def read_tensors(directory: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Reads the named tensors, flat, in one process and without any process group."""
    stored = stored_tensors(directory)
    if lost := [name for name in names if name not in stored]:
        raise UserError(f"{directory}: has no {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))
    whole = [
        Fragment(
            name, stored[name].size.numel(), 0, torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        )
        for name in names
    ]
    load_fragments(whole, directory, alone=True)
    return {fragment.name: fragment.data for fragment in whole}
