"""Which charts a page has, and the points of their lines.

A line is named `source/column`: `train/loss`, `heldout/ce`, `score/fid`, `routing/entropy/1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mepa_ds.reports.page.axes import RunAxes
from mepa_ds.reports.page.series import bin_edges, binned, middles, rounded
from mepa_ds.reports.records import Column, RunRecords, flat_numbers

_PARTS = ("data", "inputs", "forward", "backward", "optimizer")
_NOT_CHARTS = {  # places, the page's other parts, or another column once more
    "step", "images", "samples", "epoch", "steps", "applied", "mean_step_seconds", "step_seconds", "step_loss",
    "ce_last", "accuracy_last", "tokens_per_second", "own_seconds",
}  # fmt: skip
_EXACT = {"lr", "scales", "skipped_steps", "replaced_samples", "peak_memory_bytes", "revived_codes", "guidance"}
"""What is no measurement has no noise."""
_GIB = 2.0**30


@dataclass(frozen=True)
class Chart:
    """A chart. `lines` are (name, label); `ordered`: its lines are a scale's each; `stack`: its lines add up."""

    id: str
    section: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    caption: str = ""
    ordered: bool = False
    stack: bool = False


_OPTIMISATION = (  # of both kinds of runs
    Chart("lr", "Optimisation", "Learning rate", "", (("train/lr", "rate"),)),
    Chart("grad_norm", "Optimisation", "Gradient norm", "before clipping", (("train/grad_norm", "norm"),)),
)


class Lines:
    """The lines of one run: columns of its training records, and of its other records with numbers."""

    def __init__(self, records: RunRecords, routing: Sequence[tuple[int, dict[str, float]]]):
        self._train = records.train
        self.tables: dict[str, dict[str, Column]] = {"train": records.train}
        for event in ("heldout", "score"):
            rows = [(record["step"], dict(flat_numbers(record))) for record in records.of(event)]
            if rows:
                self.tables[event] = _table(rows)
        if routing:
            self.tables["routing"] = _table(routing)

    def names(self) -> list[str]:
        return [f"{source}/{column}" for source, table in self.tables.items() for column in table]

    def column(self, name: str) -> Column | None:
        source, _, column = name.partition("/")
        return self.tables.get(source, {}).get(column)

    def points(self, wanted: Iterable[str], axes: RunAxes, most: int) -> dict[str, Any]:
        """Returns, by source, `x` on every axis and the points of each wanted line, at most `most` of each."""
        found: dict[str, Any] = {}
        by_source: dict[str, list[str]] = {}
        for name in dict.fromkeys(wanted):
            if self.column(name) is not None:
                by_source.setdefault(name.partition("/")[0], []).append(name)
        for source, names in by_source.items():
            table = self.tables[source]
            edges = bin_edges(len(table["step"]), most)
            found[source] = {"x": axes.at(table["step"][middles(edges)]), "lines": {}}
            for name in names:
                column = name.partition("/")[2]
                values = table[column] / _divisor(column)
                if source == "train":
                    points = binned(values, edges).as_json(noise=column not in _EXACT)
                else:  # each is a measurement of its own
                    points = {"line": rounded(values[middles(edges)])}
                    if f"{column}_low" in table:
                        points |= {end: rounded(table[f"{column}_{end}"][middles(edges)]) for end in ("low", "high")}
                        points["interval"] = True
                found[source]["lines"][name] = points
        return found


def charts_of(runs: Sequence[Lines], kind: str) -> list[Chart]:
    """Returns the charts for which at least one run has a line. Every number of a training record is in one of them."""
    names = list(dict.fromkeys(name for lines in runs for name in lines.names()))
    charts = [chart for chart in (_with(chart, names) for chart in _planned(names, kind)) if chart.lines]
    shown = {name for chart in charts for name, _ in chart.lines}
    charts += _others(names, shown)
    return [chart for chart in charts if any(_drawn(lines, chart) for lines in runs)]


def as_json(chart: Chart) -> dict[str, Any]:
    return asdict(chart)


def _planned(names: Sequence[str], kind: str) -> list[Chart]:
    per_scale = [
        Chart("ce_scale", "Loss by scale", "Cross-entropy by scale", "nats a token", _scales(names, "train/ce_scale"),
              "Training. A scale's line is missing where it was not trained yet.", ordered=True),
        Chart("heldout_ce_scale", "Loss by scale", "Held-out cross-entropy by scale", "nats a token",
              _scales(names, "heldout/ce_scale"), ordered=True),
        Chart("accuracy_scale", "Loss by scale", "Accuracy by scale", "share of tokens",
              _scales(names, "train/accuracy_scale"), "Training: how often the most probable code is the right one.",
              ordered=True),
        Chart("heldout_accuracy_scale", "Loss by scale", "Held-out accuracy by scale", "share of tokens",
              _scales(names, "heldout/accuracy_scale"), ordered=True),
    ]  # fmt: skip
    speed = [
        Chart("speed", "Speed and memory", "Throughput", "images a second", (("train/images_per_second", "images/s"),)),
        Chart("mfu", "Speed and memory", "Model FLOPs utilisation", "share of the GPUs' peak", (("train/mfu", "MFU"),)),
        Chart("flops", "Speed and memory", "Model FLOPs", "FLOP/s of all ranks",
              (("train/flops_per_second", "FLOP/s"),)),
        Chart("split", "Speed and memory", "A step's time, part by part", "seconds of a step",
              tuple((f"train/{part}_seconds", part) for part in _PARTS),
              "Of the last step of each record; the parts add up to the step.", stack=True),
        Chart("waits", "Speed and memory", "Waiting, and the slowest rank", "seconds of a step",
              (("train/loader_seconds", "reading images (rank 0)"), ("train/all_to_all_seconds", "tokens on their way"),
               ("train/own_seconds_fastest", "own work, fastest rank"),
               ("train/own_seconds_slowest", "own work, slowest rank"))),
        Chart("memory", "Speed and memory", "Peak memory", "GiB of the fullest rank",
              (("train/peak_memory_bytes", "peak"),),
              "The most so far: resident memory on a CPU, allocated memory on a GPU."),
    ]  # fmt: skip
    if kind == "tokenizer":
        return [*_tokenizer(names), *speed]
    return [
        Chart("loss", "Loss", "Loss", "total", (("train/loss", "training"),), "What is minimised: the weighted sum."),
        Chart("ce", "Loss", "Cross-entropy", "nats a token", (("train/ce", "training"), ("heldout/ce", "held-out"))),
        Chart("accuracy", "Loss", "Accuracy", "share of tokens",
              (("train/accuracy", "training"), ("heldout/accuracy", "held-out"))),
        *per_scale,
        Chart("alignment", "Guidance", "Alignment loss", "minus the cosines", (("train/alignment", "alignment"),),
              "Minus the cosine with the teacher's features, summed over the guided scales, before its weight."),
        Chart("guidance_cosine", "Guidance", "Cosine with the teacher", "mean over guided scales",
              (("train/guidance_cosine", "cosine"),)),
        Chart("guidance", "Guidance", "Strength of guidance", "factor", (("train/guidance", "guidance"),)),
        *_OPTIMISATION,
        Chart("scales", "Optimisation", "Scales trained", "scales", (("train/scales", "scales"),)),
        Chart("skipped", "Optimisation", "Skipped steps and replaced samples", "so far",
              (("train/skipped_steps", "steps with a gradient that was not finite"),
               ("train/replaced_samples", "damaged samples that others replaced"))),
        Chart("balance", "Experts", "Balance loss", "mean over layers", (("train/balance", "balance"),)),
        Chart("max_expert_share", "Experts", "The fullest expert", "share of its layer's routed pairs",
              (("train/max_expert_share", "largest share of a layer"),)),
        Chart("router_z", "Experts", "Router z-loss", "mean over layers", (("train/router_z", "z-loss"),)),
        Chart("entropy", "Experts", "Entropy of the router", "nats, mean over layers",
              _scales(names, "routing/entropy"), "Near 0: it always knows; ln(experts): it chooses at random.",
              ordered=True),
        Chart("variance", "Experts", "Variance of the load", "percent squared over experts",
              _scales(names, "routing/variance"), "0: every expert gets as much. Mean over layers.", ordered=True),
        Chart("dropped", "Experts", "Dropped tokens", "share of routed pairs", _scales(names, "routing/dropped"),
              ordered=True),
        *_scores(names),
        *speed,
    ]  # fmt: skip


def _tokenizer(names: Sequence[str]) -> list[Chart]:
    known = {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "train/codebook_use",
             "train/perplexity", "train/revived_codes", "train/replaced_samples"}  # fmt: skip
    terms = [name for name in names if name.startswith("train/") and "/" not in name[6:] and name not in known]
    return [
        Chart("loss", "Loss", "Loss", "total", (("train/loss", "training"),)),
        *(Chart(f"term-{name[6:]}", "Loss", _words(name[6:]), "", ((name, "training"),))
          for name in terms if name[6:] not in _NOT_CHARTS),
        Chart("psnr", "Held-out reconstructions", "PSNR", "dB", (("heldout/psnr", "held-out"),)),
        Chart("ssim", "Held-out reconstructions", "SSIM", "", (("heldout/ssim", "held-out"),)),
        Chart("lpips", "Held-out reconstructions", "LPIPS", "", (("heldout/lpips", "held-out"),)),
        Chart("use", "Codebook", "Codes in use", "share of the codebook",
              (("train/codebook_use", "training"), ("heldout/codebook_use", "held-out"))),
        Chart("use_scale", "Codebook", "Codes in use by scale", "share of the codebook",
              _scales(names, "train/codebook_use_by_scale"), ordered=True),
        Chart("heldout_use_scale", "Codebook", "Codes in use by scale, held-out", "share of the codebook",
              _scales(names, "heldout/codebook_use_by_scale"), ordered=True),
        Chart("heldout_perplexity_scale", "Codebook", "Perplexity by scale, held-out", "codes",
              _scales(names, "heldout/perplexity_by_scale"), ordered=True),
        Chart("perplexity", "Codebook", "Perplexity of the codes", "codes",
              (("train/perplexity", "training"), ("heldout/perplexity", "held-out"))),
        Chart("revived", "Codebook", "Revived codes", "since the last record", (("train/revived_codes", "codes"),)),
        *_OPTIMISATION,
    ]  # fmt: skip


def _scores(names: Sequence[str]) -> list[Chart]:
    """A chart for each score of generated images; their errors and intervals belong to it."""
    parts = ("_error", "_low", "_high")
    found = [name for name in names if name.startswith("score/") and not name.endswith(parts)]
    left_out = ("step", "seconds", "num_samples", "num_reference", "classifier_heldout_accuracy")
    caption = "Of generated images (log.score). The band is the 95 % interval over images."
    return [
        Chart(f"score-{name[6:]}", "Scores of generated images", name[6:], "", ((name, "generated images"),), caption)
        for name in found if name[6:] not in left_out
    ]  # fmt: skip


def _others(names: Sequence[str], shown: set[str]) -> list[Chart]:
    """Charts of the numbers that no other chart has: those of newer versions, say. Lists have one chart."""
    groups: dict[str, list[str]] = {}
    for name in names:
        source, _, column = name.partition("/")
        column = re.sub(r"/\d+$", "", column)
        of_train = source == "train" and column not in _NOT_CHARTS
        of_heldout = source == "heldout" and column not in (*_NOT_CHARTS, "best", "seconds", "num_images")
        if name not in shown and (of_train or of_heldout):
            groups.setdefault(f"{source}/{column}", []).append(name)
    charts = []
    for group, members in groups.items():
        source, _, column = group.partition("/")
        several = len(members) > 1 or "/" in members[0].partition("/")[2]
        lines = tuple((name, f"{name.rpartition('/')[2]}" if several else source) for name in members)
        title = _words(column) + (", held-out" if source == "heldout" else "")
        charts.append(Chart(f"other-{source}-{column}", "Further numbers", title, "", lines, ordered=several))
    return charts


def _scales(names: Sequence[str], prefix: str) -> tuple[tuple[str, str], ...]:
    found = [name for name in names if re.fullmatch(re.escape(prefix) + r"/\d+", name)]
    return tuple((name, f"scale {name.rpartition('/')[2]}") for name in found)


def _with(chart: Chart, names: Sequence[str]) -> Chart:
    """Without lines that no run has."""
    return Chart(**{**asdict(chart), "lines": tuple(line for line in chart.lines if line[0] in names)})


def _drawn(lines: Lines, chart: Chart) -> bool:
    """Whether the run has something to see there: counts that stay 0, and scales that are all trained, are nothing."""
    columns = [column for name, _ in chart.lines if (column := lines.column(name)) is not None]
    finite = [column[np.isfinite(column)] for column in columns]
    if chart.id in ("skipped", "revived", "replaced", "dropped"):
        return any(len(column) and column.any() for column in finite)
    if chart.id == "scales":
        return any(len(column) and np.ptp(column) > 0 for column in finite)
    return any(len(column) for column in finite)


def _table(rows: Sequence[tuple[int, dict[str, float]]]) -> dict[str, Column]:
    names = dict.fromkeys(name for _, row in rows for name in row)
    table = {name: np.array([row.get(name, np.nan) for _, row in rows]) for name in names}
    return {**table, "step": np.array([float(step) for step, _ in rows])}


def _divisor(column: str) -> float:
    return _GIB if column.endswith("memory_bytes") else 1.0


def _words(column: str) -> str:
    words = column.replace("_", " ")
    return words[:1].upper() + words[1:]
