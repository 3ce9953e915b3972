"""`mepa scale collect`: one table of all runs of a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.scaling.columns import BY_SCALE, COLUMNS, SCORES
from mepa_ds.scaling.running.collect import TABLE_NAME, collect
from mepa_ds.scaling.study.plan import read_study


def _columns() -> str:
    return "\n".join(f"  {name:<18}{meaning}" for name, meaning in (COLUMNS | BY_SCALE | SCORES).items())


@dataclass
class CollectOptions:
    study: tyro.conf.Positional[Path]
    """Study file, or the output_dir of a planned study."""


def main(argv: list[str]) -> None:
    description = f"Writes table.csv and table.parquet to the study's output_dir, a row a run:\n\n{_columns()}"
    options = tyro.cli(CollectOptions, prog="mepa scale collect", description=description, args=argv)
    study = read_study(options.study)
    table = collect(study)
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    log.say(f"{len(table)} runs ({counts}): {study.output_dir / TABLE_NAME}.csv and .parquet")
