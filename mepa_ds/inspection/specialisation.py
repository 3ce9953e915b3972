"""What the choice of experts has to do with the class: mutual information for each MoE layer and scale.

Shapes: B images, L positions, E experts, C classes, P permutations.
"""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.files import atomic_path
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.inspection.tracing import Traced
from mepa_ds.reports import style

_PERMUTATIONS = 200
_LEAST_IMAGES_OF_A_CLASS = 2


@dataclass(frozen=True)
class Specialisation:
    """Mutual information of expert and class, in nats, over the (token, choice) pairs of a layer and a scale."""

    mutual_information: float
    """The plug-in estimate, which is too large: few tokens make any expert look special."""
    chance: float
    """Its mean when the classes are exchanged between images."""
    corrected: float
    """The difference: about 0 where experts do not know the class, log(number of classes) where they tell it."""
    share: float
    """`corrected` as a share of the most that it could be: of the entropy of the classes, or of log(E / K) where K of
    E experts for each token cannot tell as many classes; less `chance`."""
    p_value: float
    """Share of the exchanges that reach the plug-in estimate."""


def specialisation(
    counts_BE: NDArray[Any], labels_B: NDArray[np.int64], num_choices: int = 1, seed: int = 0
) -> Specialisation:
    """From the pairs that each image gave to each expert; `num_choices` is K, the different experts of a token.

    Classes are exchanged between whole images, since the tokens of an image are not independent of each other: a
    correction that counts tokens, as Miller's and Madow's, would be too small.
    """
    by_class_B = labels_B.argsort(kind="stable")
    starts_C = np.flatnonzero(np.diff(labels_B[by_class_B], prepend=labels_B.min() - 1))

    def table(order_B: NDArray[np.int64]) -> NDArray[np.float64]:
        """(C, E) counts, if the images came in this order, class after class."""
        return np.add.reduceat(counts_BE[order_B].astype(np.float64), starts_C)

    table_CE = table(by_class_B)
    found = _mutual_information(table_CE)
    rng = np.random.default_rng(seed)
    exchanged_P = np.array([_mutual_information(table(rng.permutation(len(labels_B)))) for _ in range(_PERMUTATIONS)])
    chance = float(exchanged_P.mean())
    most = min(_entropy(table_CE.sum(1) / table_CE.sum()), math.log(counts_BE.shape[1] / num_choices))
    room = most - chance
    share = (found - chance) / room if room > 0 else 0.0
    p_value = (1 + int((exchanged_P >= found - 1e-12).sum())) / (1 + _PERMUTATIONS)
    return Specialisation(found, chance, found - chance, share, p_value)


def _mutual_information(counts_CE: NDArray[np.float64]) -> float:
    joint_CE = counts_CE / counts_CE.sum()
    return _entropy(joint_CE.sum(1)) + _entropy(joint_CE.sum(0)) - _entropy(joint_CE.ravel())


def _entropy(probability: NDArray[np.float64]) -> float:
    seen = probability[probability > 0]
    return float(-(seen * np.log(seen)).sum())


def draw_specialisation(subject: Subject, traced: Traced | None, directory: Path) -> Drawn:
    """Writes specialisation.png and .csv."""
    if traced is None:
        return "expert specialisation: the model is dense, it has no experts"
    classes, per_class_C = np.unique(traced.labels_B, return_counts=True)
    if len(classes) < 2 or per_class_C.max() < _LEAST_IMAGES_OF_A_CLASS:
        return (
            f"expert specialisation: {len(traced.labels_B)} images of {len(classes)} classes say nothing of it; "
            "use more --images"
        )
    schedule, moe = subject.model.schedule, subject.model.config.moe
    assert moe is not None
    num_choices = 1 if moe.router == "expert_choice" else moe.top_k
    table = {
        block: [
            specialisation(_pairs(layer.chosen_BLE[:, start:end]), traced.labels_B, num_choices)
            for start, end in schedule.bounds
        ]
        for block, layer in traced.layers.items()
    }
    data, path = directory / "specialisation.csv", directory / "specialisation.png"
    with atomic_path(data) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["block", "scale", "side", *(field.name for field in fields(Specialisation))])
        for block, row in table.items():
            for scale, (side, found) in enumerate(zip(schedule.sides, row, strict=True), start=1):
                writer.writerow([block, scale, side, *(f"{value:.6g}" for value in asdict(found).values())])
    _figure(subject, traced, table, path)
    shows = (
        f"left: mutual information of expert and class for each MoE block and scale, less that of exchanged classes, "
        f"as a share of the most that it could be ({len(traced.labels_B)} {traced.source}; at the first scale the "
        "class is the router's only input); right: where it is largest beyond the first scale, the share of each "
        "class's choices that fell on each expert"
    )
    return [Picture(path, shows, data)]


def _pairs(chosen_BlE: NDArray[np.bool_]) -> NDArray[np.float64]:
    return chosen_BlE.sum(1).astype(np.float64)


def _figure(subject: Subject, traced: Traced, table: dict[int, list[Specialisation]], path: Path) -> None:
    schedule, blocks = subject.model.schedule, list(table)
    share_NS = np.array([[found.share for found in row] for row in table.values()])
    with style.drawing():
        figure, (left, right) = style.new_figure(
            2, f"Do experts know the class? {len(traced.labels_B)} {traced.source}"
        )
        drawn = left.imshow(share_NS, vmin=0, vmax=max(float(share_NS.max()), 1e-3), cmap="viridis", aspect="auto")
        figure.colorbar(drawn, ax=left, label="share of the most possible")
        left.set_xticks(range(schedule.num_scales), [str(side) for side in schedule.sides])
        left.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        left.set(xlabel="side of the scale", ylabel="MoE block", title="corrected mutual information")
        later_NS = share_NS[:, 1:] if schedule.num_scales > 1 else share_NS
        row, later = divmod(int(later_NS.argmax()), later_NS.shape[1])
        scale = later + share_NS.shape[1] - later_NS.shape[1]
        start, end = schedule.bounds[scale]
        counts_BE = _pairs(traced.layers[blocks[row]].chosen_BLE[:, start:end])
        classes = np.unique(traced.labels_B)
        if len(classes) > 20:  # those whose tokens are least spread over experts
            largest = [(_shares(counts_BE, traced.labels_B, int(label)).max(), label) for label in classes]
            classes = np.array(sorted(label for _, label in sorted(largest)[-20:]))
        shares_CE = np.stack([_shares(counts_BE, traced.labels_B, int(label)) for label in classes])
        drawn = right.imshow(shares_CE, vmin=0, cmap="magma", aspect="auto")
        figure.colorbar(drawn, ax=right, label="share of the class's choices")
        right.set_yticks(
            range(len(classes)), [style.plain(subject.caption(int(label)), 24) for label in classes], fontsize=8
        )
        right.set_xticks(range(counts_BE.shape[1]) if counts_BE.shape[1] <= 16 else range(0, counts_BE.shape[1], 8))
        best = table[blocks[row]][scale]
        title = (
            f"block {blocks[row]}, scale {schedule.sides[scale]} x {schedule.sides[scale]}: {best.corrected:.2f} nats"
        )
        right.set(xlabel="expert", title=f"{title}, p <= {best.p_value:.2g}")
        for axes in (left, right):
            axes.grid(False)
        style.save_png(figure, path)


def _shares(counts_BE: NDArray[np.float64], labels_B: NDArray[np.int64], label: int) -> NDArray[np.float64]:
    counts_E = counts_BE[labels_B == label].sum(0)
    return counts_E / max(counts_E.sum(), math.ulp(0))
