"""What the laws of mixtures of experts say; `mepa_ds.scaling.laws.moe` fits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mepa_ds.scaling.laws.fitting.result import Fit


def effective_experts(E: Any, Es: Any, Em: Any) -> Any:
    """Ê: 1 / Ê = 1 / (E - 1 + (1 / Es - 1 / Em)^-1) + 1 / Em. Es at E = 1, Em in the limit of many experts."""
    return 1 / (1 / (E - 1 + 1 / (1 / Es - 1 / Em)) + 1 / Em)


@dataclass(frozen=True, kw_only=True)
class RoutedFit(Fit):
    """log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d (Clark et al., arXiv 2202.01169, equation 6)."""

    law: ClassVar[str] = "routed"
    parameter_names: ClassVar[tuple[str, ...]] = ("a", "b", "c", "d", "Es", "Em")
    input_names: ClassVar[tuple[str, ...]] = ("N", "E")

    a: float
    b: float
    c: float
    d: float
    Es: float
    Em: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The law, in nats."""
        N, E = inputs
        p = parameters
        x, z = np.log10(N), np.log10(effective_experts(E, p["Es"], p["Em"]))
        return 10 ** (p["a"] * x + p["b"] * z + p["c"] * x * z + p["d"])


@dataclass(frozen=True, kw_only=True)
class JointMoEFit(Fit):
    """L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c (arXiv 2502.05172, equation 5).

    N is the active weights. alpha, beta and so on are the powers themselves: alpha and beta below 0.
    """

    law: ClassVar[str] = "joint-moe"
    parameter_names: ClassVar[tuple[str, ...]] = (
        "a", "alpha", "delta", "gamma", "b", "beta", "omega", "zeta", "c", "Es", "Em"
    )  # fmt: skip
    input_names: ClassVar[tuple[str, ...]] = ("N_active", "E", "D")

    a: float
    alpha: float
    delta: float
    gamma: float
    b: float
    beta: float
    omega: float
    zeta: float
    c: float
    Es: float
    Em: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The law, in nats."""
        N, E, D = inputs
        p = parameters
        z = np.log(effective_experts(E, p["Es"], p["Em"]))
        size = p["a"] * np.exp(p["delta"] * z + (p["alpha"] + p["gamma"] * z) * np.log(N))
        data = p["b"] * np.exp(p["omega"] * z + (p["beta"] + p["zeta"] * z) * np.log(D))
        return size + data + p["c"]

    def at_experts(self, E: float) -> dict[str, float]:
        """The law of one number of experts: L = m N^mu + n D^nu + c."""
        z = float(np.log(effective_experts(E, self.Es, self.Em)))
        return {
            "m": self.a * float(np.exp(self.delta * z)),
            "mu": self.alpha + self.gamma * z,
            "n": self.b * float(np.exp(self.omega * z)),
            "nu": self.beta + self.zeta * z,
            "c": self.c,
        }


@dataclass(frozen=True, kw_only=True)
class FineGrainedMoEFit(Fit):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta, G the granularity (arXiv 2402.07871, equation 9)."""

    law: ClassVar[str] = "fine-grained-moe"
    parameter_names: ClassVar[tuple[str, ...]] = ("a", "alpha", "b", "beta", "g", "gamma", "c")
    input_names: ClassVar[tuple[str, ...]] = ("N", "G", "D")

    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The law, in nats."""
        N, G, D = inputs
        p = parameters
        return p["c"] + (p["g"] * G ** -p["gamma"] + p["a"]) * N ** -p["alpha"] + p["b"] * D ** -p["beta"]
