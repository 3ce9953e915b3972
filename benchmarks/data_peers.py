"""Other loaders of shuffled samples from local shards, for benchmarks/data.py: MosaicML streaming and litdata.

Both get the same samples as ours, all members of a sample in one record, in shards of one size, uncompressed and with
shuffling on. They give batches of tensors as ours does, by PyTorch's DataLoader or their own, in this process. litdata
has three ways: as it is by default, where it decodes neighbours of a sample too; sample by sample (`batch_decode=0`);
and so without batches, where its arrays are views of mapped files that nobody has read yet.

The packages are optional (`pip install mosaicml-streaming litdata`); one that is missing is left out with a line.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.samples import LABEL_EXTENSION
from mepa_ds.data.shards.writer import read_npy_header

Record = dict[str, Any]
Ways = dict[str, Callable[[], None]]
BATCH = 64
_SHARD_BYTES = 1 << 26
_DONE = "complete"


def records(sets: list[ShardSet]) -> Iterator[Record]:
    """The samples of sibling sets: arrays by extension, and the label."""
    for number in range(len(sets[0])):
        record: Record = {}
        for shards in sets:
            for extension, data in shards.read(number)[1].items():
                if extension == LABEL_EXTENSION:
                    record["label"] = int(data)
                else:
                    member, start = read_npy_header(data)
                    array = np.frombuffer(data, member.dtype, offset=start)
                    record[extension.removesuffix(".npy")] = array.reshape(member.shape or ())
        yield record


def mosaicml_streaming(directory: Path, samples: Iterable[Record]) -> Ways:
    streaming = importlib.import_module("streaming")
    if not (directory / _DONE).exists():
        writer = None
        for record in samples:
            if writer is None:
                columns = {name: _column(value) for name, value in record.items()}
                writer = streaming.MDSWriter(out=str(directory), columns=columns, size_limit=_SHARD_BYTES)
            writer.write(record)
        if writer is not None:
            writer.finish()
        (directory / _DONE).touch()
    dataset = streaming.StreamingDataset(local=str(directory), shuffle=True, batch_size=BATCH)
    return {"mosaicml-streaming": _epoch_of(DataLoader(dataset, batch_size=BATCH, drop_last=True))}


def _column(value: Any) -> str:
    """How MosaicML streaming names the type of a value."""
    return "int" if isinstance(value, int) else f"ndarray:{value.dtype}:{','.join(map(str, value.shape))}"


def litdata(directory: Path, samples: Iterable[Record]) -> Ways:
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask the network for news of itself
    library = importlib.import_module("litdata")
    if not (directory / _DONE).exists():
        cache = importlib.import_module("litdata.streaming").Cache(str(directory), chunk_bytes=_SHARD_BYTES)
        for number, record in enumerate(samples):
            cache[number] = record
        cache.done()
        cache.merge()
        (directory / _DONE).touch()
    default, single = (
        library.StreamingDataset(str(directory), shuffle=True, batch_decode=decoded) for decoded in ("auto", 0)
    )
    loader = library.StreamingDataLoader
    return {
        "litdata": _epoch_of(loader(default, batch_size=BATCH, drop_last=True)),
        "litdata, batch_decode=0": _epoch_of(loader(single, batch_size=BATCH, drop_last=True)),
        "litdata, no batches": _epoch_of(single),
    }


def _epoch_of(dataset: Iterable[Any]) -> Callable[[], None]:
    def epoch() -> None:
        for _ in dataset:
            pass

    return epoch


PEERS: dict[str, Callable[[Path, Iterable[Record]], Ways]] = {
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata,
}


def peer_ways(directory: Path, sets: list[Path]) -> Ways:
    """An epoch of each installed package, by its name. Writes the samples in its format where they are not yet."""
    ways: Ways = {}
    for name, prepare in PEERS.items():
        try:
            ways |= prepare(directory / name, records([ShardSet(path) for path in sets]))
        except ModuleNotFoundError as error:
            print(f"{name}: left out, it is not installed ({error.name}): pip install {name}")
    return ways


def is_peer(way: str) -> bool:
    """Whether a way to read is one of another package."""
    return way.startswith(tuple(PEERS))
