"""A run's moment as lines of text: state and bar, numbers, losses, the last warning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from mepa_ds.runtime.log_line import duration
from mepa_ds.safety.secrets import redacted
from mepa_ds.safety.text import printable
from mepa_ds.watching.run import RunNow

_COLOURS = {
    "running": "green",
    "starting": "green",
    "finished": "cyan",
    "stopped": "yellow",
    "killed": "red",
    "failed": "red",
    "diverged": "red",
}
_LEVELS = "▁▂▃▄▅▆▇█"
_BAR = 30
_LONGEST = 20  # of a number that stands as a text: nan, inf
_NUMBERS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("train", "epoch", "epoch", "{:.2f}".format),
    ("train", "loss", "loss", "{:.4f}".format),
    ("train", "ce", "ce", "{:.4f}".format),
    ("heldout", "ce", "held-out", "{:.4f}".format),
    ("heldout", "psnr", "held-out", "{:.2f} dB".format),
    ("train", "guidance_cosine", "cosine", "{:.3f}".format),
    ("train", "max_expert_share", "expert", "{:.0%}".format),
    ("train", "codebook_use", "codes", "{:.0%}".format),
    ("train", "images_per_second", "", "{:.0f} images/s".format),
)


def frame(runs: Sequence[RunNow], width: int) -> Text:
    """Returns the text of all runs, in lines of at most `width` characters."""
    lines = [
        line for number, run in enumerate(runs) for line in ([Text()] if number else []) + list(_lines(run, width))
    ]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n").join(lines)


def _lines(run: RunNow, width: int) -> Iterator[Text]:
    head = Text.assemble((printable(run.path), "bold"), "  ", (printable(run.state), _COLOURS.get(run.state, "")))
    if run.num_steps:
        share = min(run.step / run.num_steps, 1.0)
        done = round(share * _BAR)
        head.append(f"  step {run.step}/{run.num_steps}  ")
        head.append("━" * done, "green")
        head.append("─" * (_BAR - done), "dim")
        head.append(f" {share:.0%}")
        left = run.status.get("seconds_left")
        if run.state == "running" and isinstance(left, (int, float)):
            head.append(f"  {duration(left)} left")
    yield head
    if numbers := "  ".join(_numbers(run)):
        yield Text(f"  {numbers}")
    elif run.state not in ("not there", "failed"):
        yield Text("  nothing is logged yet", "dim")
    if len(run.losses) > 1:
        yield Text(f"  loss {_spark(run.losses, min(width - 30, 80))}")
    if error := run.status.get("error"):
        yield Text(f"  {_in_a_line(error)}", "red")
    if run.warning is not None:
        step, message = run.warning
        yield Text(f"  warning at step {step}: {_in_a_line(message)}", "yellow")


def _numbers(run: RunNow) -> Iterator[str]:
    records: dict[str, dict[str, Any]] = {"train": run.train, "heldout": run.heldout}
    for record, key, word, write in _NUMBERS:
        value = records[record].get(key)
        if isinstance(value, (int, float)):
            yield f"{word} {write(value)}".strip()
        elif isinstance(value, str):  # a number that JSON lacks
            yield f"{word} {printable(value[:_LONGEST])}".strip()


def _in_a_line(said: object) -> str:
    """A text of a run's files. Rich's `Text` reads no markup, but lets control characters through."""
    return printable(redacted(" ".join(str(said).split())))


def _spark(losses: Sequence[float], width: int) -> str:
    """The losses as a line of characters, the lowest and the highest of them beside it; means where there are more."""
    count = max(min(width, len(losses)), 1)
    cuts = [len(losses) * place // count for place in range(count + 1)]
    means = [math.fsum(losses[first:end]) / (end - first) for first, end in pairwise(cuts)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_LEVELS) - 1) or 1.0
    line = "".join(_LEVELS[round((value - low) / step)] for value in means)
    return f"{line}  {means[0]:.4f} → {means[-1]:.4f}"
