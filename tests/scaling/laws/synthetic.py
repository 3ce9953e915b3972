"""Runs as a study would have them, drawn from known laws; and each law a second time, as loops over plain numbers.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws import FitOptions

Array = NDArray[np.float64]
QUICK = FitOptions(draws=0)

POWER = {"E": 2.0, "A": 406.4, "alpha": 0.3}
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""Hoffmann's (arXiv 2203.15556)."""
DATA = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353, "RN_star": 5.31, "RD_star": 15.39}
"""Of arXiv 2305.16264."""
ROUTED = {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "Es": 1.847, "Em": 314.478}
JOINT = {
    "a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775, "omega": 0.5529,
    "zeta": -0.0259, "c": 1.3637, "Es": 2.0732, "Em": 290.4521,
}  # fmt: skip
FINE = {"a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147, "g": 2.1, "gamma": 0.58, "c": 0.47}

INDEX = np.arange(36)
SIZES: Array = np.geomspace(1e7, 1e9, 6)[INDEX // 6]
TOKENS: Array = np.geomspace(1e9, 1e11, 6)[INDEX % 6]
LATIN = (INDEX + INDEX // 6) % 6
UNIQUE: Array = np.geomspace(1e9, 3e10, 6)[INDEX % 6] / np.array([1, 4, 16, 64, 100, 2])[LATIN]
"""With the lengths of `REPEATED`: each epoch count once a size and once a length."""
REPEATED: Array = np.geomspace(1e9, 3e10, 6)[INDEX % 6]
EXPERTS: Array = np.array([1.0, 2, 4, 8, 16, 32])[LATIN]
GRANULARITY: Array = np.array([1.0, 2, 4, 8, 16, 1])[LATIN]
LADDER: Array = np.repeat(np.geomspace(1e6, 1e10, 12), 3)


def power_loss(p: dict[str, float], x: float) -> float:
    return p["E"] + p["A"] / x ** p["alpha"]


def chinchilla_loss(p: dict[str, float], n: float, d: float) -> float:
    return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


def data_loss(p: dict[str, float], n: float, d: float, unique: float) -> float:
    """As the paper has it, with G and the best size for U_D from C = 6 N D."""
    u_d = min(unique, d)
    ratio = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    best = ratio * (u_d * ratio) ** (p["beta"] / p["alpha"])
    u_n = min(n, best)
    r_d, r_n = max(d / u_d - 1, 0), max(n / u_n - 1, 0)
    effective_d = u_d + u_d * p["RD_star"] * (1 - math.exp(-r_d / p["RD_star"]))
    effective_n = u_n + u_n * p["RN_star"] * (1 - math.exp(-r_n / p["RN_star"]))
    return p["E"] + p["A"] / effective_n ** p["alpha"] + p["B"] / effective_d ** p["beta"]


def experts_seen(p: dict[str, float], e: float) -> float:
    start = 1 / (1 / p["Es"] - 1 / p["Em"])
    return 1 / (1 / (e - 1 + start) + 1 / p["Em"])


def routed_loss(p: dict[str, float], n: float, e: float) -> float:
    seen = math.log10(experts_seen(p, e))
    return float(10 ** (p["a"] * math.log10(n) + p["b"] * seen + p["c"] * math.log10(n) * seen + p["d"]))


def joint_loss(p: dict[str, float], n: float, e: float, d: float) -> float:
    seen = experts_seen(p, e)
    size = p["a"] * seen ** p["delta"] * n ** (p["alpha"] + p["gamma"] * math.log(seen))
    data = p["b"] * seen ** p["omega"] * d ** (p["beta"] + p["zeta"] * math.log(seen))
    return float(size + data + p["c"])


def fine_loss(p: dict[str, float], n: float, g: float, d: float) -> float:
    return p["c"] + (p["g"] / g ** p["gamma"] + p["a"]) / n ** p["alpha"] + p["b"] / d ** p["beta"]


def losses(law: Callable[..., float], p: dict[str, float], *inputs: Array) -> Array:
    """The law at each row, without noise."""
    return np.array([law(p, *(float(value) for value in row)) for row in zip(*inputs, strict=True)])


def noisy(loss_N: Array, seed: int, size: float = 0.01) -> Array:
    """With log-normal noise."""
    result: Array = loss_N * np.exp(size * np.random.default_rng(seed).normal(size=len(loss_N)))
    return result


def objective(predicted_N: Array, loss_N: Array, options: FitOptions = QUICK) -> float:
    """The stated objective, term by term."""
    total = 0.0
    for predicted, measured in zip(predicted_N.tolist(), loss_N.tolist(), strict=True):
        rest = math.log(predicted) - math.log(measured)
        if options.objective == "log_ls":
            total += rest**2 / 2
        elif options.objective == "raw_ls":
            total += (predicted - measured) ** 2 / 2
        else:
            huber = rest**2 / 2 if abs(rest) <= options.delta else options.delta * (abs(rest) - options.delta / 2)
            total += huber * (options.asymmetry if options.objective == "asymmetric" and rest < 0 else 1.0)
    return total
