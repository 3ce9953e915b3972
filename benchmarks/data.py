"""Speed of the loader: samples/s and bytes/s of one worker, against plain webdataset and `cat` on the same files.

    python benchmarks/data.py [--json FILE] [--samples 3000]
    python benchmarks/data.py --peers

Makes shards in a temporary directory (tokens as VAR's, features of 256 x 768 by codec, JPEG images of 500 x 375),
reads them into the page cache, then takes turns: `cat`, plain `wds.WebDataset(...).shuffle(200).decode()`, and the
loader in this process, as webdataset is. The best of the rounds counts, for each alike. A batch of ours is ready for
the model: joined, checked, in tensors. Dequantising is outside the timing, of webdataset's as of ours: features travel
as they are stored and become fp32 on the device; how fast a CPU thread does that is a line of its own. JPEG is decoded
and cropped inside the timing, also in 1 and 2 processes of the loader.

Samples/s with one thread that reads ahead are measured too. It serves to read beside a GPU's work; with nothing else to
do, the interpreter's lock that changes hands makes it slower than this process alone.

Two rows have as many shards as ImageNet, so that a uniform order meets another file with each sample. Such short shards
cost plain webdataset more than the loader: compare these rows with the loader's others, and with `cat`.

With --peers, MosaicML streaming and litdata read the same samples (benchmarks/data_peers.py), and only two rows are
measured, tokens and tokens with int8 features.

Shuffle quality is that of sets read through a window of shards, ImageNet's size, against a uniform permutation.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import webdataset as wds
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.data_peers import PEERS, is_peer, peer_ways
from mepa_ds.config.model import SCALES_256
from mepa_ds.data.codecs import BASIS_NAME, PcaBasis, codec_named, pca_components
from mepa_ds.data.images import image_batches
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.order import OrderedStream, SampleOrder, shuffle_quality
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import (
    Description,
    MadeBy,
    Member,
    ShardEntry,
    ShardIndex,
    keys_digest,
    write_offset_index,
)
from mepa_ds.data.shards.offset_index import OffsetIndex
from mepa_ds.data.shards.samples import Kind
from mepa_ds.data.shards.writer import Manifest, Sample, ShardWriter, npy_bytes, shard_name
from mepa_ds.data.training import training_batches
from mepa_ds.images.resizing import fit_image

NUM_TOKENS, NUM_PATCHES, WIDTH, NUM_SHARDS, BATCH = 680, 256, 768, 3, 64
IMAGENET_SHARDS, SHARD_SAMPLES, GLOBAL_BATCH = 1282, 1000, 768
WINDOWS = (4, 8, 32)
CODECS = ("int8", "fp16", "pca256-int8")
# Samples a shard where there are as many shards as ImageNet has: 0.4 GB of tokens, 3.1 GB with features.
MANY_TOKENS, MANY_FEATURES = 100, 12


@dataclass(frozen=True)
class Options:
    samples: int = 3000
    """Samples of the token and feature sets."""
    images: int = 600
    """JPEGs."""
    rounds: int = 8
    """The best of so many counts."""
    peers: bool = False
    """Measure MosaicML streaming and litdata too, where they are installed, and nothing but the first two sets."""
    directory: Path | None = None
    """Where to put the shards, or where they are from a run with the same numbers; by default a temporary directory."""
    json: Path | None = None
    """Write the numbers to this file."""


@dataclass
class Row:
    """One kind of shards, read in three ways."""

    name: str
    samples: int
    total_bytes: int
    seconds: dict[str, float]
    """Wall time of each way."""
    cpu_seconds: dict[str, float]
    """CPU time of each way, all threads and finished children: steadier on a busy machine."""

    def summary(self) -> dict[str, Any]:
        rates = {name: self.samples / seconds for name, seconds in self.seconds.items()}
        return {
            "name": self.name,
            "samples_per_second": {name: round(rate) for name, rate in rates.items()},
            "bytes_per_second": {name: round(self.total_bytes / seconds) for name, seconds in self.seconds.items()},
            "loader_over_webdataset": round(rates["loader"] / rates["webdataset"], 2),
            "loader_over": {way: round(rates["loader"] / rate, 2) for way, rate in rates.items() if is_peer(way)},
            "loader_over_cpu": {
                way: round(seconds / self.cpu_seconds["loader"], 2)
                for way, seconds in self.cpu_seconds.items()
                if is_peer(way)
            },
            "loader_over_cat": round(rates["loader"] / rates["cat"], 3),
            "loader_over_webdataset_cpu": round(self.cpu_seconds["webdataset"] / self.cpu_seconds["loader"], 2),
            "loader_over_cat_cpu": round(self.cpu_seconds["cat"] / self.cpu_seconds["loader"], 3),
        }


def write_set(
    directory: Path,
    kind: Kind,
    num: int,
    members: Callable[[int], dict[str, bytes]],
    num_shards: int = NUM_SHARDS,
    **settings: Any,
) -> None:
    per_shard = num // num_shards
    names = tuple(shard_name(number) for number in range(num_shards))
    # `num` among the settings: shards of a run with other numbers are refused, not taken for these.
    manifest = Manifest(kind=kind, shard_names=names, made_by=MadeBy(name="random", settings={**settings, "num": num}))
    writer = ShardWriter(directory, manifest)
    for shard, name in enumerate(names):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        samples: Iterator[Sample] = ((f"{number:09d}", members(number)) for number in numbers)
        if not writer.is_complete(name):
            writer.write_shard(name, samples)
    writer.finish()


def make_shards(root: Path, options: Options) -> None:
    rng = np.random.default_rng(0)

    def tokens(number: int) -> dict[str, bytes]:
        codes = rng.integers(0, 4096, NUM_TOKENS).astype(np.uint16)
        return {"tokens.npy": npy_bytes(codes), "cls": str(number % 1000).encode()}

    def photo(number: int) -> dict[str, bytes]:
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        return {"jpg": buffer.getvalue(), "cls": str(number % 1000).encode()}

    write_set(root / "tokens", "tokens", options.samples, tokens, scales=list(SCALES_256), codebook_size=4096)
    if not options.peers:
        write_set(root / "images", "images", options.images, photo)
    for name in ("int8",) if options.peers else CODECS:
        components = pca_components(name)
        basis = None
        if components is not None:
            rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
            basis = PcaBasis(torch.zeros(WIDTH), rotation[:components].contiguous(), "random")
            basis.save(root / name / BASIS_NAME)
        codec = codec_named(name, basis)

        def features(number: int, codec: Any = codec) -> dict[str, bytes]:
            values = torch.from_numpy(rng.standard_normal((NUM_PATCHES, WIDTH), dtype=np.float32))
            return {extension: npy_bytes(array.numpy()) for extension, array in codec.encode(values).items()}

        write_set(root / name, "features", options.samples, features, codec=name, width=WIDTH)
        if name == "int8" and not options.peers:
            few = [features(number) for number in range(64)]  # the same again and again: quantising takes its time
            num = MANY_FEATURES * IMAGENET_SHARDS
            many: dict[str, Any] = {"num_shards": IMAGENET_SHARDS, "codec": name, "width": WIDTH}
            write_set(root / "many-int8", "features", num, lambda number: few[number % 64], **many)  # noqa: B023
    for name, per_shard in () if options.peers else (("many-tokens", MANY_TOKENS), ("many-int8-tokens", MANY_FEATURES)):
        settings: dict[str, Any] = {"num_shards": IMAGENET_SHARDS, "scales": list(SCALES_256), "codebook_size": 4096}
        write_set(root / name, "tokens", per_shard * IMAGENET_SHARDS, tokens, **settings)


def shards_of(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.glob("*.tar"))


def cat(directories: list[Path]) -> None:
    files = [name for directory in directories for name in shards_of(directory)]
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def plain(directory: Path, *decoders: Any) -> Any:
    return wds.WebDataset(shards_of(directory), shardshuffle=False, empty_check=False).shuffle(200).decode(*decoders)


def drain(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass


class LoaderRun:
    """A running loader, asked for an epoch at a time, as training does."""

    def __init__(self, batches: Iterator[Any], samples: int):
        self._batches, self._steps = batches, samples // BATCH
        self.samples = self._steps * BATCH

    def warm_up(self) -> None:
        """Takes what was prepared while others had their turn, so that it does not count."""
        for _ in range(8):
            next(self._batches)

    def __call__(self) -> None:
        for _ in range(self._steps):
            next(self._batches)


def cpu_time() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(who.ru_utime + who.ru_stime for who in usage)


def measure(name: str, directories: list[Path], ways: dict[str, Callable[[], None]], samples: int, rounds: int) -> Row:
    """Best seconds of each way for `samples` samples; the ways take turns, so that a busy machine hits all alike."""
    total_bytes = sum(Path(file).stat().st_size for directory in directories for file in shards_of(directory))
    seconds = dict.fromkeys(ways, float("inf"))
    cpu_seconds = dict(seconds)
    for _ in range(rounds):
        for way, run in ways.items():
            if isinstance(run, LoaderRun):
                run.warm_up()
            start, cpu_start = time.perf_counter(), cpu_time()
            run()
            share = samples / run.samples if isinstance(run, LoaderRun) else 1.0
            seconds[way] = min(seconds[way], (time.perf_counter() - start) * share)
            cpu_seconds[way] = min(cpu_seconds[way], (cpu_time() - cpu_start) * share)
    return Row(name, samples, total_bytes, seconds, cpu_seconds)


def measure_precomputed(
    name: str,
    tokens: Path,
    features: Path | None,
    samples: int,
    rounds: int,
    others: dict[str, Callable[[], None]] | None = None,
) -> Row:
    """`others` are further ways to read the same samples."""
    directories = [tokens] if features is None else [tokens, features]
    own, ahead = (
        LoaderRun(
            training_batches(tokens, features, global_batch=BATCH, seed=0, options=LoaderOptions(num_workers=workers)),
            samples,
        )
        for workers in (0, 1)
    )

    def webdataset() -> None:
        drain(zip(*(plain(directory) for directory in directories), strict=True))

    ways: dict[str, Callable[[], None]] = {
        "cat": lambda: cat(directories),
        "webdataset": webdataset,
        "loader": own,
        "loader, a thread ahead": ahead,
        **(others or {}),
    }
    return measure(name, directories, ways, samples, rounds)


def measure_all_precomputed(root: Path, options: Options) -> list[Row]:
    few, many, rounds = options.samples, IMAGENET_SHARDS, min(options.rounds, 4)
    rows = [measure_precomputed("tokens", root / "tokens", None, few, options.rounds)]
    for codec in CODECS:
        name = f"tokens + features {codec}"
        rows.append(measure_precomputed(name, root / "tokens", root / codec, few, options.rounds))
    num, name = MANY_TOKENS * many, f"tokens, {many} shards"
    rows.append(measure_precomputed(name, root / "many-tokens", None, num, rounds))
    num, name = MANY_FEATURES * many, f"tokens + features int8, {many} shards"
    rows.append(measure_precomputed(name, root / "many-int8-tokens", root / "many-int8", num, rounds))
    return rows


def measure_peers(root: Path, options: Options) -> list[Row]:
    tokens, features = root / "tokens", root / "int8"
    rows = []
    for name, sets in (("tokens", [tokens]), ("tokens + features int8", [tokens, features])):
        ways = peer_ways(root / f"peers of {name}", sets)
        own = sets[1] if len(sets) > 1 else None
        rows.append(measure_precomputed(name, tokens, own, options.samples, options.rounds, ways))
    return rows


def decode_like_the_loader(sample: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(fit_image(sample["jpg"], 256, (0.3, 0.7))).transpose(2, 0, 1).copy()


def measure_images(root: Path, options: Options) -> Row:
    directory = root / "images"
    loader = image_batches(directory, batch_size=BATCH, image_side=256)  # in this process, as webdataset does
    ways: dict[str, Callable[[], None]] = {
        "cat": lambda: cat([directory]),
        "webdataset": lambda: drain(plain(directory, "pil").map(decode_like_the_loader)),
        "loader": LoaderRun(loader, options.images),
    }
    for workers in (1, 2):
        batches = image_batches(directory, batch_size=BATCH, image_side=256, options=LoaderOptions(num_workers=workers))
        ways[f"loader_{workers}_processes"] = LoaderRun(batches, options.images)
    return measure("images, JPEG 500 x 375 to 256", [directory], ways, options.images, min(options.rounds, 3))


def dequantise_rate(root: Path) -> dict[str, float]:
    """Samples a second that one CPU thread dequantises; on a GPU this is a fraction of a millisecond a batch."""
    rates: dict[str, float] = {}
    for codec in CODECS:
        batch = next(training_batches(root / "tokens", root / codec, global_batch=BATCH, seed=0))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert batch.features_BNC is not None
            times.append(time.perf_counter() - start)
        rates[codec] = round(BATCH / min(times))
    return rates


def startup_seconds(root: Path) -> float:
    """From opening a token set of ImageNet's size (1282 shards) to knowing where the first 768 samples lie."""
    entries = []
    for number in range(IMAGENET_SHARDS):
        name = shard_name(number)
        keys = np.array([f"{number * SHARD_SAMPLES + row:09d}".encode() for row in range(SHARD_SAMPLES)])
        offsets = np.arange(SHARD_SAMPLES, dtype=np.int64)[:, None] * 3072 + np.array([[512, 2560]])
        sizes = np.tile(np.array([[1488, 3]]), (SHARD_SAMPLES, 1))
        offset_index = OffsetIndex(keys, ("tokens.npy", "cls"), offsets, sizes, np.arange(SHARD_SAMPLES))
        entry = ShardEntry(
            name=name, num_samples=SHARD_SAMPLES, bytes=3080192, sha256="", keys_sha256=keys_digest(offset_index)
        )
        write_offset_index(root / name, offset_index, Description(entry=entry, members={}))
        entries.append(entry)
    members = {"tokens.npy": Member(dtype="uint16", shape=(NUM_TOKENS,)), "cls": Member()}
    ShardIndex(kind="tokens", shards=tuple(entries), members=members, made_by=MadeBy(name="random")).write(root)
    start = time.perf_counter()
    shards = ShardSet(root)
    shards.keys(OrderedStream(SampleOrder(shards.shard_sizes, 0)).samples_at(np.arange(768)))
    return time.perf_counter() - start


def windowed_quality() -> dict[int, dict[str, float]]:
    """`shuffle_quality` of one epoch by window: 1.0 is a uniform permutation's."""
    sizes = (SHARD_SAMPLES,) * IMAGENET_SHARDS
    shard_of_sample = np.repeat(np.arange(IMAGENET_SHARDS), SHARD_SAMPLES)
    result = {}
    for window in WINDOWS:
        quality = shuffle_quality(SampleOrder(sizes, 0, window).epoch(0), shard_of_sample, GLOBAL_BATCH)
        result[window] = {name: round(value, 3) for name, value in quality.items()}
    return result


def report_peers(rows: list[Row], path: Path | None) -> None:
    summaries = [row.summary() for row in rows]
    for summary in summaries:
        for way, rate in summary["samples_per_second"].items():
            ratio = summary["samples_per_second"]["loader"] / rate
            print(f"{summary['name']:<24} {way:<25} {rate:>8} samples/s   ours over it {ratio:6.2f}")
        print(f"{summary['name']:<24} by CPU time, ours over: {summary['loader_over_cpu']}")
    if path is not None:
        versions = {name: metadata.version(name) for name in PEERS if name in summaries[0]["samples_per_second"]}
        path.write_text(json.dumps({"rows": summaries, "versions": versions}, indent=2) + "\n")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.directory or Path(temporary)
        make_shards(root, options)
        if options.peers:
            report_peers(measure_peers(root, options), options.json)
            return
        os.sync()  # or the disk is still being written while the first ways are timed
        rows = measure_all_precomputed(root, options)
        rows.append(measure_images(root, options))
        result = {
            "rows": [row.summary() for row in rows],
            "features_dequantised_per_second_cpu": dequantise_rate(root),
            "shuffle_quality_by_window": windowed_quality(),
            "startup_seconds_imagenet": round(startup_seconds(Path(temporary) / "startup"), 2),
            "torch": torch.__version__,
            "webdataset": wds.__version__,
        }
    for row in rows:
        summary = row.summary()
        rates = summary["samples_per_second"]
        print(
            f"{row.name:36s} loader {rates['loader']:7d}/s {summary['bytes_per_second']['loader'] / 1e9:5.2f} GB/s   "
            f"webdataset {rates['webdataset']:6d}/s   ratio {summary['loader_over_webdataset']:6.2f}   "
            f"of cat {summary['loader_over_cat']:.2f}   by CPU time: {summary['loader_over_webdataset_cpu']:6.2f} "
            f"and {summary['loader_over_cat_cpu']:.2f}"
        )
    print("dequantised on one CPU thread, samples/s:", result["features_dequantised_per_second_cpu"])
    processes = {way: rate for way, rate in rows[-1].summary()["samples_per_second"].items() if "processes" in way}
    print("JPEG images/s:", processes)
    print("shuffle quality by window of shards (1.0: uniform):", result["shuffle_quality_by_window"])
    print("seconds to open a set of ImageNet's size:", result["startup_seconds_imagenet"])
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
