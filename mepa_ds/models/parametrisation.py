"""The maximal update parametrisation (muP) for width: how initial weights and rates change with C.

With m = C / C0, where C0 is the base width at which rates were tuned, Adam's rates of a weight matrix scale as in
Tensor Programs V (arXiv 2203.03466, table 8, in the form without multipliers in the forward pass):

    weight    what grows with C        initial std       rate     weight decay
    input     nothing, or fan-out      that of C0        1        1
    hidden    fan-in and fan-out       1 / sqrt(C)       1 / m    m
    output    fan-in                   that of C0 / m    1 / m    m

Biases, vectors, embeddings and tables over scales are input weights. AdaLN is hidden (arXiv 2505.15270): it maps the
embedding of the class, C wide, to scales, shifts and gates of C channels. Experts, whose hidden width grows with C,
are hidden, and the router's gate is an output (arXiv 2508.09752; 2605.14200 contests rates of experts that do not
depend on their number). Decay times rate stays the same for all. At m = 1 this is the standard parametrisation exactly.

It needs heads of a fixed width, that is num_heads proportional to C. Depth, the number of experts, their granularity
and top-k are not covered.
"""

from __future__ import annotations

import math
from typing import Literal

Role = Literal["input", "hidden", "output"]
_HIDDEN = (
    ".attention.qkv.weight",
    ".attention.proj.weight",
    ".fc1.weight",
    ".fc2.weight",
    ".experts.fc1_weight",
    ".experts.fc2_weight",
    "adaln.weight",
)
_OUTPUT = ("head.weight", ".router.gate.weight", "projector.0.weight")


def width_multiplier(width: int, base_width: int | None) -> float:
    """Returns m = C / C0; 1 without a base width."""
    return 1.0 if base_width is None else width / base_width


def role_of(name: str) -> Role:
    """Returns the role of a parameter of the transformer or of the guidance projector, by its name."""
    if name.endswith(_HIDDEN):
        return "hidden"
    return "output" if name.endswith(_OUTPUT) else "input"


def init_factor(name: str, m: float) -> float:
    """Returns the factor on the initial standard deviation, which is 1 / sqrt(C) in the standard parametrisation."""
    return {"input": math.sqrt(m), "hidden": 1.0, "output": 1 / math.sqrt(m)}[role_of(name)]


def lr_factor(name: str, m: float) -> float:
    """Returns the factor on the learning rate; one over it is the factor on the weight decay."""
    return 1.0 if role_of(name) == "input" else 1 / m
