"""Checks shard sets: `mepa data verify IMAGES [TOKENS FEATURES ...]`; exit status 1 for any damage.

Of each set: sizes and checksums, offsets, keys (unique, and the same in all sets), labels (in range, and the same in
images and tokens), every image, token map and feature map decoded. Prints a class histogram, and images that are
there twice. `--repair` re-makes the damaged shards of token and feature sets from the images.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes long to import
    from mepa_ds.interrupts import raise_interrupts

    raise_interrupts()

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import PathOrName
from mepa_ds.data.remote.remote_file import REMOTE_NAME
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import offset_index_path, source_images
from mepa_ds.data.shards.left_out import LeftOut, few
from mepa_ds.data_tools.pool import DEFAULT_WORKERS, unordered_map
from mepa_ds.data_tools.shard_checks import ShardReport, check_shard
from mepa_ds.errors import UserError
from mepa_ds.progress import Progress
from mepa_ds.safety.text import printable

_SHOWN = 20


@dataclass(frozen=True)
class Options:
    sets: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of sets that belong together, the image set first."""
    decode: bool = True
    """Decode every sample; otherwise only checksums, offsets and keys are checked."""
    workers: int = DEFAULT_WORKERS
    """Processes."""
    repair: bool = False
    """Re-make damaged shards of token and feature sets; needs --tokenizer, --weights."""
    tokenizer: Path | None = None
    """For --repair: the tokenizer that made the tokens."""
    weights: PathOrName | None = None
    """For --repair: the weights of the teacher that made the features."""


@dataclass
class SetReport:
    """What was found in one set."""

    shards: ShardSet
    reports: list[ShardReport]
    problems: list[str] = field(default_factory=list)
    """Problems of the set as a whole, which no single shard has."""

    @property
    def damaged(self) -> list[int]:
        """Numbers of the damaged shards."""
        return [report.shard for report in self.reports if report.problems]

    @property
    def is_whole(self) -> bool:
        return not self.problems and not self.damaged


def check_set(directory: Path, options: Options) -> SetReport:
    """Checks all shards of one set."""
    if (directory / REMOTE_NAME).exists():
        raise UserError(f"{directory}: its shards are remote; run this where they lie")
    shards = ShardSet(directory)
    reports = []
    total = sum(shard.bytes for shard in shards.index.shards)
    with Progress(total=total, unit="B", unit_scale=True, desc=str(directory)) as progress:
        check = partial(check_shard, shards, options.decode)
        for report in unordered_map(check, range(len(shards.index.shards)), options.workers):
            reports.append(report)
            progress.update(shards.index.shards[report.shard].bytes)
    reports.sort(key=lambda report: report.shard)
    _check_unique(reports)
    return SetReport(shards, reports)


def _check_unique(reports: list[ShardReport]) -> None:
    seen: dict[bytes, int] = {}
    for report in reports:
        for key in report.keys:
            if key in seen:
                report.problems.append(f"key {key.decode()!r} is also in shard {seen[key]}")
            seen[key] = report.shard


def compare(first: SetReport, other: SetReport) -> None:
    """Adds to `other` the problems of not fitting the first set, as a whole and shard by shard."""
    if len(first.reports) != len(other.reports):
        other.problems.append(
            f"the set has {len(other.reports)} shards, {first.shards.directory} has {len(first.reports)}"
        )
    sources = [source_images(report.shards.index) for report in (first, other)]
    if None not in sources and sources[0] != sources[1]:
        other.problems.append(
            f"the set was made from other images than {first.shards.directory}; make one of them again"
        )
    for ours, theirs in zip(first.reports, other.reports, strict=False):
        # A shard whose own damage hides its keys or labels is reported only for that damage.
        if ours.keys and theirs.keys and ours.keys != theirs.keys:
            theirs.problems.append(f"its keys are not those of {first.shards.shard_paths[ours.shard]}")
        complete = len(ours.labels) == len(ours.keys) and len(theirs.labels) == len(theirs.keys)
        if complete and ours.labels != theirs.labels:
            theirs.problems.append(f"its labels are not those of {first.shards.shard_paths[ours.shard]}")


def print_report(report: SetReport) -> None:
    """Problems by shard, classes, duplicates."""
    index = report.shards.index
    log.say(f"{report.shards.directory}: {index.num_samples} {index.kind} in {len(index.shards)} shards")
    problems = [f"  {problem}" for problem in report.problems]
    problems += [
        f"  {index.shards[shard.shard].name}: {problem}" for shard in report.reports for problem in shard.problems
    ]
    for line in problems[:_SHOWN]:
        log.say(line)
    if len(problems) > _SHOWN:
        log.say(f"  ... and {len(problems) - _SHOWN} problems more")
    left_out = LeftOut()
    for shard in report.reports:
        left_out.update(shard.left_out)
    if left_out:
        log.say(f"  {left_out}")
    skipped = sum(len(entry.skipped) for entry in index.shards)
    if skipped:
        log.say(f"  {skipped} damaged source images were left out when the set was made (index.json names them)")
    counts = Counter(label for shard in report.reports for label in shard.labels)
    if counts:
        _print_histogram(counts, index.classes)
    _print_copies(report)
    if not problems:
        log.say("  no damage found")


def _print_copies(report: SetReport) -> None:
    keys: dict[bytes, list[str]] = {}
    for shard in report.reports:
        for content, key in shard.contents:
            keys.setdefault(content, []).append(key)
    copies = [same for same in keys.values() if len(same) > 1]
    if copies:
        log.say(f"  {sum(map(len, copies)) - len(copies)} images are copies of others (a warning only):")
        for same in copies[:_SHOWN]:
            log.say(f"    {' = '.join(map(printable, same[:_SHOWN]))}{' = ...' if len(same) > _SHOWN else ''}")
        if len(copies) > _SHOWN:
            log.say(f"    ... and {len(copies) - _SHOWN} images more that have copies")


def _print_histogram(counts: Counter[int], classes: tuple[str, ...]) -> None:
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    values = sorted(counts.values())
    log.say(f"  {len(counts)} classes with {values[0]} to {values[-1]} samples, median {values[len(values) // 2]}")
    if empty:
        log.say(f"  {len(empty)} classes without samples: {few(empty, 10)}")
    if len(counts) <= _SHOWN:
        for label, count in sorted(counts.items()):
            name = classes[label] if classes else label
            log.say(f"    {printable(name):20.20} {count:8d} {'#' * (count * 40 // values[-1])}")


def repair(first: SetReport, derived: list[SetReport], options: Options) -> None:
    """Runs the precompute for the damaged shards of token and feature sets.

    Raises:
        UserError: the images themselves are damaged, a set does not belong to them, or its tokenizer or teacher is not
            given or is another one. Nothing has been changed then.
    """
    if first.shards.index.kind != "images":
        raise UserError("--repair: give the image set first: tokens and features are made from it")
    if first.damaged:
        raise UserError(
            f"--repair: {first.shards.directory} is damaged itself: remove the {len(first.damaged)} shards named above "
            "and run mepa data build with the settings in index.json again, then this"
        )
    for report in derived:
        if report.problems:
            raise UserError(
                f"--repair: {report.shards.directory}: {report.problems[0]}; shards made again would not mend that"
            )
    damaged = [report for report in derived if report.damaged]
    runs = [_precompute(first.shards.directory, report.shards, options).prepared() for report in damaged]
    for report, run in zip(damaged, runs, strict=True):
        for number in report.damaged:
            offset_index_path(report.shards.shard_paths[number]).unlink(missing_ok=True)  # it counts as incomplete now
        log.say(f"{report.shards.directory}: making {len(report.damaged)} shards again")
        run()


def _precompute(images: Path, shards: ShardSet, options: Options) -> Any:
    """The precompute command, with the settings that the set was made with."""
    from mepa_ds.data_tools.precompute import Features, Tokens

    made_by, out = shards.index.made_by, shards.directory
    settings = made_by.settings
    views = {"views": settings.get("views", "centre"), "views_seed": settings.get("views_seed", 0)}
    if shards.index.kind == "tokens":
        if options.tokenizer is None:
            raise UserError(f"--repair: {out} was made by tokenizer {made_by.name!r}; give it as --tokenizer")
        return Tokens(images, options.tokenizer, tuple(settings["scales"]), out=out, **views)
    return Features(
        images,
        made_by.name,
        options.weights,
        codec=settings["codec"],
        grid_side=settings["grid_side"],
        image_side=settings.get("image_side"),
        cls=settings.get("cls", False),
        out=out,
        **views,
    )


def verify(options: Options) -> bool:
    """Checks all sets and prints what was found; True if nothing is wrong."""
    if not options.sets:
        raise UserError("give at least one shard set")
    reports = [check_set(directory, options) for directory in options.sets]
    for report in reports[1:]:
        compare(reports[0], report)
    for report in reports:
        print_report(report)
    return all(report.is_whole for report in reports) or _repaired(reports, options)


def _repaired(reports: list[SetReport], options: Options) -> bool:
    if not options.repair:
        return False
    repair(reports[0], reports[1:], options)
    again = [check_set(directory, options) for directory in options.sets]
    for report in again[1:]:
        compare(again[0], report)
        print_report(report)
    return all(report.is_whole for report in again)


def main(argv: Sequence[str] | None = None, prog: str = "verify_shards.py") -> None:
    if not verify(tyro.cli(Options, prog=prog, args=argv, description=__doc__)):
        sys.exit(1)


if __name__ == "__main__":
    entry.run(main)
