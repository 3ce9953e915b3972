"""`mepa watch`: runs as they go on, in a terminal."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds.command_line import entry
from mepa_ds.errors import UserError
from mepa_ds.interrupts import Interrupted

# Where the output is no terminal, nothing needs to be cut.
_WIDE = 400
_MOST_SECONDS = 86400.0


@dataclass
class WatchOptions:
    """Shows runs of pretraining or of a tokenizer's training while they go on; Ctrl-C ends it. Reads files alone.

    Of each run: state, steps, time left, the last loss, cross-entropy (ce), held-out score, cosine of guidance, largest
    share of an expert, images per second, the losses of the last records as a line, and the last warning.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """output_dir of each run; it may be one that is yet to start."""
    once: bool = False
    """Print the state at this moment and end; so does a command whose output is no terminal."""
    every: float = 1.0
    """Seconds between two looks."""


def main(argv: list[str]) -> None:
    options = tyro.cli(WatchOptions, prog="mepa watch", args=argv)
    if not options.runs:
        raise UserError("give the output_dir of a run, or of several")
    if not 0 < options.every <= _MOST_SECONDS:
        raise UserError(f"--every {options.every:g}: expected seconds above 0, at most {_MOST_SECONDS:g}")
    for path in options.runs:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; give the output_dir of a run")
    if options.once or not sys.stdout.isatty():
        print_once(options.runs)
    else:
        try:
            watch(options.runs, options.every)
        except Interrupted as end:
            if end.number != signal.SIGINT:
                raise


def print_once(paths: Sequence[Path]) -> None:
    """Prints one frame."""
    from rich.console import Console

    from mepa_ds.watching.frame import frame
    from mepa_ds.watching.run import WatchedRun

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE
    Console(width=width, highlight=False).print(frame([WatchedRun(path).look() for path in paths], width))


def watch(paths: Sequence[Path], every: float) -> None:
    """Draws frames until it is interrupted."""
    from rich.console import Console
    from rich.live import Live

    from mepa_ds.watching.frame import frame
    from mepa_ds.watching.run import WatchedRun

    console, runs = Console(highlight=False), [WatchedRun(path) for path in paths]
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(frame([run.look() for run in runs], console.width), refresh=True)
            time.sleep(every)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
