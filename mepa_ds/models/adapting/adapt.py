"""What of a model's weights another model can start from, and what of it starts anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mepa_ds.config.model import ModelConfig
from mepa_ds.errors import UserError
from mepa_ds.models.adapting.experts import more_experts
from mepa_ds.models.adapting.scales import resampled
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.transformer_files import with_weights
from mepa_ds.models.upcycling import upcycle

Missing = Literal["classes", "scales", "all"]
CLASSES = "class_embed.weight"


@dataclass
class Adapted:
    """Weights under the names of the new model, and what happened to them, in words."""

    state: dict[str, Tensor]
    config: ModelConfig
    """What the weights are now of."""
    notes: list[str] = field(default_factory=list)


def adapt(
    theirs: ModelConfig,
    state: Mapping[str, Tensor],
    their_classes: Sequence[str],
    ours: ModelConfig,
    our_classes: Sequence[str],
    missing: Missing,
    drawn_classes: Callable[[], Tensor],
) -> Adapted:
    """Makes weights of the config `theirs` fit the config `ours`, as far as `missing` allows.

    Args:
        state: names -> tensors, on the CPU, which fit `theirs`.
        their_classes, our_classes: names of the classes by label; empty where they are not known.
        missing: "classes": the number of classes, or their names, may differ; "scales": the schedule, too; "all":
            experts, too, from a dense model or from fewer experts.
        drawn_classes: gives (classes + 1, C) embeddings as they were drawn for our model.

    Raises:
        UserError: experts that cannot be made from these weights.
    """
    adapted = Adapted(dict(state), theirs)
    their_classes = their_classes[: theirs.num_classes]  # a config.json may name more
    if theirs.scales != ours.scales and missing != "classes":
        adapted.state |= resampled(adapted.state, theirs.schedule, ours.schedule)
        adapted.config = adapted.config.model_copy(update={"scales": ours.scales})
        adapted.notes.append(
            f"was trained with scales {list(theirs.scales)}: embeddings of positions and scales are resampled"
        )
    if missing == "all":
        _fit_experts(adapted, ours)
    others = theirs.num_classes != ours.num_classes or (our_classes and their_classes and our_classes != their_classes)
    if others and theirs.C == ours.C:  # no row fits another width, which the caller refuses
        _fit_classes(adapted, their_classes, ours, our_classes, drawn_classes)
    return adapted


def _fit_experts(adapted: Adapted, ours: ModelConfig) -> None:
    theirs = adapted.config
    if ours.moe is None:
        return
    if theirs.moe is None:
        dense = with_weights(lambda: NextScaleTransformer(theirs), adapted.state, "init_weights")
        upcycled = upcycle(dense, ours.moe)
        adapted.state, adapted.config = upcycled.state_dict(), upcycled.config
        adapted.notes.append(f"is dense: {ours.moe.num_experts} experts are made of each FFN")
    elif theirs.moe.num_experts != ours.moe.num_experts:
        adapted.state = more_experts(adapted.state, ours.moe.num_experts)
        moe = theirs.moe.model_copy(update={"num_experts": ours.moe.num_experts, "top_k": ours.moe.top_k})
        adapted.config = theirs.model_copy(update={"moe": moe})
        adapted.notes.append(f"has {theirs.moe.num_experts} experts: they are copied to {ours.moe.num_experts}")


def _fit_classes(
    adapted: Adapted,
    their_classes: Sequence[str],
    ours: ModelConfig,
    our_classes: Sequence[str],
    drawn_classes: Callable[[], Tensor],
) -> None:
    """Rows of classes with the same name are taken, and that of no class; the others are as they were drawn."""
    rows, expected = adapted.state.get(CLASSES), (adapted.config.num_classes + 1, ours.C)
    if rows is None or rows.shape != expected:
        raise UserError(f"{CLASSES}: {'missing' if rows is None else tuple(rows.shape)}, expected {expected}")
    drawn = drawn_classes()
    drawn[-1] = rows[-1].to(drawn)
    counts = Counter(their_classes)
    place = {name: label for label, name in enumerate(their_classes) if name and counts[name] == 1}
    taken = [(label, place[name]) for label, name in enumerate(our_classes[: ours.num_classes]) if name in place]
    for label, other in taken:
        drawn[label] = rows[other].to(drawn)
    known = f"knows {adapted.config.num_classes} classes, model.num_classes is {ours.num_classes}"
    if taken:
        adapted.notes.append(f"{known}: the embeddings of {len(taken)} are taken by name, the others start anew")
    else:
        adapted.notes.append(f"{known}: embeddings of the classes start anew, all else is taken")
    adapted.state[CLASSES] = drawn
    adapted.config = adapted.config.model_copy(update={"num_classes": ours.num_classes})
