"""What a user may choose about a fit, in one value."""

from __future__ import annotations

from dataclasses import dataclass

from mepa_ds.errors import UserError

OBJECTIVES = ("huber", "log_ls", "raw_ls", "asymmetric")
MIN_STARTS = 48


@dataclass(frozen=True)
class FitOptions:
    """How a law is fitted and how its intervals are made. The defaults are Hoffmann's (arXiv 2203.15556, equation 4).

    With r = log(predicted loss) - log(measured loss), the objective is a *sum* over rows of

    - `huber`: r^2 / 2 where |r| <= delta, and delta (|r| - delta / 2) beyond;
    - `log_ls`: r^2 / 2;
    - `raw_ls`: (predicted loss - measured loss)^2 / 2;
    - `asymmetric`: the Huber term, times `asymmetry` where the measured loss lies above the law. Below 1, a run that
      went badly pulls less than one that went well.

    Args:
        delta: where the Huber terms turn from squares to lines, in log loss; above 0.
        asymmetry: in (0, 100]; used by `asymmetric` alone.
        num_starts: starts of the optimiser, at least 48.
        draws: draws of the bootstrap; 0 makes no intervals, else at least 100.
        level: share of the intervals, in [0.5, 0.999].
        seed: of the bootstrap's draws.

    Raises:
        UserError: a value outside its range.
    """

    objective: str = "huber"
    delta: float = 1e-3
    asymmetry: float = 0.25
    num_starts: int = 64
    draws: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "objective": (self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
            "delta": (0 < self.delta < float("inf"), "a number above 0"),
            "asymmetry": (0 < self.asymmetry <= 100, "a number above 0 and at most 100"),
            "num_starts": (self.num_starts >= MIN_STARTS, f"at least {MIN_STARTS}"),
            "draws": (self.draws == 0 or self.draws >= 100, "0, for no intervals, or at least 100"),
            "level": (0.5 <= self.level <= 0.999, "between 0.5 and 0.999"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (good, what) in allowed.items():
            if not good:
                raise UserError(f"{name}: {getattr(self, name)!r} is not allowed; give {what}")
