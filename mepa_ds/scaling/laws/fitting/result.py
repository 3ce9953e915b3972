"""What every fit returns: parameters, intervals, flags, predictions, and itself as JSON.

Shapes: N rows, B bootstrap draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr
from scipy.stats import t as student

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.fitting.options import FitOptions

Array = NDArray[np.float64]
FitT = TypeVar("FitT", bound="Fit")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. Subclasses add their parameters, in the units of the inputs, as attributes.

    Attributes:
        objective: the minimum of the objective that `options` names, a sum over rows.
        intervals: of each free parameter, (low, high) of its interval at `options.level`: the quantiles of the
            bootstrap's draws, taken further out than the level says, as `tail` has it. An end where the draws reach
            the edge of the parameter's range is infinite, or 0 where the edge is 0; `flags` then says so.
        flags: sentences on what a reader must know before believing the numbers; empty when there is nothing.
        num_rows: runs that were fitted.
        num_free: parameters that were fitted.
        num_starts: starts of the optimiser.
        starts_at_optimum: how many of them came within 1e-6 of the objective, relatively.
        residuals: (N,) log(measured loss) - log(predicted loss), in the order in which the rows were given.
        ranges: of each input, the smallest and largest value among the rows.
        draws: of each parameter, its values (B,) in the bootstrap.
        inflation: the bootstrap's spread times this is that of the estimate: sqrt(n / (n - p)) for residuals that the
            fit has made smaller, times sqrt(m / (m - 1)) for means of m clusters drawn from themselves.
    """

    law: ClassVar[str]
    parameter_names: ClassVar[tuple[str, ...]]
    input_names: ClassVar[tuple[str, ...]]

    objective: float
    options: FitOptions
    intervals: Mapping[str, tuple[float, float]]
    flags: tuple[str, ...]
    num_rows: int
    num_free: int
    num_starts: int
    starts_at_optimum: int
    residuals: tuple[float, ...] = field(repr=False)
    ranges: Mapping[str, tuple[float, float]]
    draws: Mapping[str, tuple[float, ...]] = field(repr=False)
    inflation: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The law itself. Parameters and inputs are numbers or arrays that broadcast."""
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in self.parameter_names}

    def predict(self, *inputs: ArrayLike) -> Any:
        """The law's loss at inputs of any shapes that broadcast; a float for numbers.

        Raises:
            UserError: inputs that are missing, not numbers or not above 0.
        """
        found = np.asarray(self.formula(self.parameters, *self._inputs(inputs)), np.float64)
        return float(found) if found.ndim == 0 else found

    def predict_interval(self, *inputs: ArrayLike, level: float | None = None, noise: bool = True) -> tuple[Any, Any]:
        """(low, high) of the loss, arrays of the inputs' shape.

        The logarithms of the draws' predictions, moved away from the law's by `inflation`; with `noise`, plus residuals
        of the fit times sqrt(n / (n - p)), for the loss that one more run would have; without, for the law's own value.
        Quantiles are taken at the tail of a normal variable that has Student's t of n - p degrees of freedom.

        Raises:
            UserError: as `predict`; the fit was made without a bootstrap.
        """
        values = self._inputs(inputs)
        if not self.draws:
            raise UserError(f"{self.law}: this fit has no bootstrap, so no intervals; fit with draws=1000")
        centre = np.log(np.asarray(self.formula(self.parameters, *values), np.float64))
        shape = (-1, *([1] * centre.ndim))
        drawn = {name: np.asarray(self.draws[name]).reshape(shape) for name in self.parameter_names}
        with np.errstate(all="ignore"):
            spread = self.inflation * (np.log(self.formula(drawn, *(value[None] for value in values))) - centre)
        if noise:
            rng = np.random.default_rng(self.options.seed)
            share = np.sqrt(self.num_rows / max(self.num_rows - self.num_free, 1))
            spread = spread + share * rng.choice(np.asarray(self.residuals), size=len(spread)).reshape(shape)
        tail = self.tail(level, 1.0)
        spread = np.where(np.isnan(spread), 0.0, spread)
        low, high = np.exp(centre + np.quantile(spread, [tail, 1 - tail], axis=0, method="median_unbiased"))
        return (float(low), float(high)) if centre.ndim == 0 else (low, high)

    def tail(self, level: float | None = None, inflation: float | None = None) -> float:
        """The share of draws beyond each end of an interval: that of a normal variable beyond inflation * t.

        t is Student's quantile with n - p degrees of freedom ("expanded percentiles": Hesterberg, arXiv 1411.5279,
        section 3.3).
        """
        return tail_share(
            self.options.level if level is None else level,
            self.num_rows - self.num_free,
            self.inflation if inflation is None else inflation,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, all numbers in full; infinities as the strings "inf" and "-inf"."""
        return {"law": self.law, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    @classmethod
    def from_dict(cls: type[FitT], data: Mapping[str, Any]) -> FitT:
        """What `to_dict` gave.

        Raises:
            UserError: another law, or missing and unknown keys.
        """
        values = dict(data)
        law = values.pop("law", None)
        names = {f.name for f in dataclasses.fields(cls)}
        if law != cls.law or set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names)) or f"law {law!r}"
            raise UserError(f"{cls.law}: this is no fit of that law ({wrong}); fit the table again")
        values["options"] = FitOptions(**values["options"])
        return cls(**{name: value if name == "options" else _read(value) for name, value in values.items()})

    def _inputs(self, inputs: tuple[ArrayLike, ...]) -> list[Array]:
        if len(inputs) != len(self.input_names):
            raise UserError(f"{self.law}: {len(inputs)} inputs; give {', '.join(self.input_names)}")
        result = []
        for name, given in zip(self.input_names, inputs, strict=True):
            try:
                value = np.asarray(given, np.float64)
            except (TypeError, ValueError):
                raise UserError(f"{self.law}: {name}: {given!r} is not a number; give numbers") from None
            if not (np.isfinite(value) & (value > 0)).all():
                raise UserError(f"{self.law}: {name}: must be finite and above 0 to be predicted for")
            result.append(value)
        return list(np.broadcast_arrays(*result))


def tail_share(level: float, freedom: int, inflation: float) -> float:
    """The share of draws beyond each end of an interval (`Fit.tail`)."""
    return float(ndtr(-inflation * student.ppf((1 + level) / 2, max(freedom, 1))))


def _plain(value: Any) -> Any:
    if isinstance(value, FitOptions):
        return dataclasses.asdict(value)
    if isinstance(value, Fit):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return [_plain(inner) for inner in value.tolist()]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _read(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_read(inner) for inner in value)
    return float(value) if value in ("inf", "-inf", "nan") else value
