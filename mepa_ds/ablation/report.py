"""The report of an ablation: one Markdown text, tables and figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mepa_ds.ablation.config import AblationConfig
from mepa_ds.ablation.figures import differences_figure, load_figure, scales_figure
from mepa_ds.ablation.results import LOAD_VARIANCE, Results, read_results, scores_by_arm
from mepa_ds.ablation.scores import Score, of_scales, shown
from mepa_ds.ablation.statistics import Difference, differences, noise_of
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, write_json, write_text
from mepa_ds.reports.style import drawing, save_png
from mepa_ds.scaling.running.members import Member

REPORT, TABLE = "report", "table.csv"
BEGIN, END = "<!-- mepa ablate: begin -->", "<!-- mepa ablate: end -->"
_FIGURE_SCORES = 4


def write_report(ablation: AblationConfig, members: Sequence[Member], into: Path | None = None) -> Path:
    """Writes output_dir/report: ablation.md, table.csv (a row a run), ablation.json, figures. Returns the text's path.

    Args:
        into: a Markdown file whose part between the lines `<!-- mepa ablate: begin -->` and `end` gets the same text;
            figures go to `figures/` beside it.

    Raises:
        UserError: no run is finished, or `into` has no such lines.
    """
    results = read_results(members)
    table = results.table
    if not (table["state"] == "finished").any():
        raise UserError(
            f"{ablation.output_dir}: no run is finished yet; mepa ablate trains them, and their logs are in its logs"
        )
    page = page_around(into) if into is not None else None
    folder = ablation.output_dir / REPORT
    with atomic_path(folder / TABLE) as temporary:
        table.to_csv(temporary, index=False)
    names = _draw(ablation, results, folder)
    text = "\n".join(_lines(ablation, results, [f"{name}.png" for name in names]))
    write_text(folder / "ablation.md", text + "\n")
    write_json(folder / "ablation.json", {**_facts(ablation, table), "protocol": results.protocol})
    if into is not None and page is not None:
        figures = into.parent / "figures"
        prefix = f"ablation_{ablation.name}_"
        for name in names:
            with atomic_path(figures / f"{prefix}{name}.png") as temporary:
                temporary.write_bytes((folder / f"{name}.png").read_bytes())
        body = "\n".join(_lines(ablation, results, [f"figures/{prefix}{name}.png" for name in names]))
        write_text(into, f"{page[0]}{BEGIN}\n\n{body}\n\n{END}{page[1]}")
    return folder / "ablation.md"


def page_around(path: Path) -> tuple[str, str]:
    """What stands before and behind the marks in a page. Raises UserError where they are not there."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"{path}: the lines {BEGIN} and {END} are not both there; add them where the result shall stand"
        )
    return head, tail


def _draw(ablation: AblationConfig, results: Results, folder: Path) -> list[str]:
    table = results.table
    figures = {}
    with drawing():
        # Not the load of experts, which the baseline may not have; load_figure shows it.
        left_out = ("ce_last", LOAD_VARIANCE)
        scores = [score for score in shown(list(table.columns)) if score.column not in left_out][:_FIGURE_SCORES]
        figures["differences"] = differences_figure(table, ablation, scores)
        figures["scales"] = scales_figure(table, ablation)
        if results.load_variance:
            figures["load"] = load_figure(results.load_variance, ablation)
        for name, figure in figures.items():
            save_png(figure, folder / f"{name}.png")
    return list(figures)


def _lines(ablation: AblationConfig, results: Results, figures: list[str]) -> list[str]:
    table = results.table
    scores = shown(list(table.columns))
    done = int((table["state"] == "finished").sum())
    first = table.iloc[0]
    lines = [
        f"{done} of {len(table)} runs are finished: {len(ablation.arms)} arms, {ablation.seeds} seeds each, "
        f"{first['steps']} steps ({first['samples']} images) a run. Runs of one seed see the same images in the same "
        f"order. Active FLOPs of all arms are within {100 * ablation.flops_tolerance:g} % of "
        f"{ablation.arms[ablation.baseline].title}'s.",
        "",
        *_unfinished(table),
        "**Mean ± standard deviation over seeds**",
        "",
        *_means(ablation, table, scores),
        "",
        f"![differences]({figures[0]})",
        "",
        f"**Differences of runs with the same seed**, with 95 % intervals (two-way layout, "
        f"{noise_of(scores_by_arm(table, 'ce')).degrees} degrees of freedom). Bold: the interval leaves out 0. "
        "Starred: also when all comparisons of the column are counted (Bonferroni).",
        "",
        *_differences(ablation, table, scores),
        "",
        "**Held-out cross-entropy by scale** (nats a token)",
        "",
        *_means(ablation, table, of_scales(list(table.columns)), sizes=False),
        "",
        f"![cross-entropy by scale]({figures[1]})",
        "",
        *([f"![expert load by scale]({figures[2]})", ""] if len(figures) > 2 else []),
        *_limits(ablation, table, scores, results.protocol),
    ]
    return lines


def _unfinished(table: pd.DataFrame) -> list[str]:
    missing = table[table["state"] != "finished"]
    if missing.empty:
        return []
    listed = ", ".join(f"{run} ({state})" for run, state in zip(missing["run"], missing["state"], strict=True))
    return [f"Not finished, and left out of everything below: {listed}.", ""]


def _means(ablation: AblationConfig, table: pd.DataFrame, scores: Sequence[Score], sizes: bool = True) -> list[str]:
    head = ["arm", *(["active", "total"] if sizes else []), *(score.title for score in scores)]
    rows = []
    for arm, facts in ablation.arms.items():
        mine = table[table["arm"] == arm]
        cells = [facts.title]
        if sizes:
            cells += [f"{mine.iloc[0][key] / 1e6:.2f}M" for key in ("params_active", "params_total")]
        for score in scores:
            values = list(scores_by_arm(mine, score.column).get(arm, {}).values())
            cells.append(_spread(values, score.digits))
        rows.append(cells)
    return markdown_table(head, rows)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _differences(ablation: AblationConfig, table: pd.DataFrame, scores: Sequence[Score]) -> list[str]:
    found = {
        score.column: {(d.arm, d.against): d for d in differences(scores_by_arm(table, score.column), ablation.pairs)}
        for score in scores
    }
    rows = [
        [
            f"{ablation.arms[arm].title} − {ablation.arms[against].title}",
            *(_interval(found[score.column].get((arm, against)), score.digits) for score in scores),
        ]
        for arm, against in ablation.pairs
    ]
    return markdown_table(["pair", *(score.title for score in scores)], rows)


def _interval(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return "–"
    text = f"{difference.mean:+.{digits}f}"
    if not np.isfinite(difference.low):
        return text
    text += f" ({difference.low:+.{digits}f} to {difference.high:+.{digits}f})"
    if difference.low > 0 or difference.high < 0:
        return f"**{text}**" + ("*" if difference.is_clear else "")
    return text


def _limits(
    ablation: AblationConfig, table: pd.DataFrame, scores: Sequence[Score], protocol: dict[str, Any]
) -> list[str]:
    """What a design of this size can and cannot show."""
    lines = ["**What this size can show.** Differences below these half-widths of the intervals are noise here:"]
    for score in scores:
        noise = noise_of(scores_by_arm(table, score.column))
        if np.isfinite(noise.deviation):
            lines.append(f"- {score.title}: {noise.half_width(ablation.seeds):.{score.digits}f}")
    lines += [
        "",
        "It says nothing about larger models, longer training or other images: experts and guidance are reported to "
        "help at 300M parameters and 100 epochs of ImageNet, far from here.",
    ]
    return [*lines, "", _how_scored(protocol)] if protocol else lines


def _how_scored(protocol: dict[str, Any]) -> str:
    sampling = protocol.get("sampling", {})
    spaces = [f"{name} ({facts['identity']})" for name, facts in protocol.get("spaces", {}).items()]
    return (
        f"**How images were scored.** {protocol.get('num_samples')} a run, sampled with the run's seed, cfg "
        f"{sampling.get('cfg')}, top-k {sampling.get('top_k')}, top-p {sampling.get('top_p')}; against "
        f"{protocol.get('num_reference')} images of `{protocol.get('reference')}`; feature spaces: "
        f"{', '.join(spaces)}; classifier: {protocol.get('classifier')}. The whole protocol is in `ablation.json`."
    )


def _facts(ablation: AblationConfig, table: pd.DataFrame) -> dict[str, Any]:
    """The report as data: by score, the noise and all differences."""
    facts: dict[str, Any] = {}
    for score in [*shown(list(table.columns)), *of_scales(list(table.columns))]:
        by_arm = scores_by_arm(table, score.column)
        noise = noise_of(by_arm)
        facts[score.column] = {
            "by_arm": {arm: list(by_seed.values()) for arm, by_seed in by_arm.items()},
            "noise": noise.deviation,
            "degrees_of_freedom": noise.degrees,
            "differences": [vars(difference) for difference in differences(by_arm, ablation.pairs)],
        }
    return {"ablation": ablation.name, "scores": facts}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---|' * (len(head) - 1)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]
