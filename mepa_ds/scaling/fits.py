"""From a table of runs to fitted laws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws import (
    FITS,
    Fit,
    FitOptions,
    HeldOut,
    fit_chinchilla,
    fit_data_constrained,
    fit_fine_grained_moe,
    fit_isoflop,
    fit_joint_moe,
    fit_link,
    fit_lr,
    fit_power,
    fit_routed,
    fit_scales,
    hold_out,
    noise_floor,
    rolling,
)
from mepa_ds.scaling.laws.fitting.checks import num_sizes
from mepa_ds.scaling.table import COLUMNS, Chosen, choose_rows, column_numbers, inputs_of, texts

LAWS: Mapping[str, Callable[..., Fit]] = {
    "power": fit_power,
    "chinchilla": fit_chinchilla,
    "data": fit_data_constrained,
    "isoflop": fit_isoflop,
    "routed": fit_routed,
    "joint-moe": fit_joint_moe,
    "fine-grained-moe": fit_fine_grained_moe,
    "var": fit_scales,
    "lr": fit_lr,
    "link": fit_link,
}
"""The fit of each law of `mepa scale fit --law`."""


@dataclass(frozen=True)
class TableFit:
    """A law fitted to a table.

    Attributes:
        law: as in `LAWS`.
        fit: the fit itself.
        columns: which column each input came from.
        runs: the names of the rows that were fitted.
        left_out: of each reason, the names of rows that were not.
        noise_floor: standard deviation of log loss among seeds; None without any.
        notes: sentences on what looks odd in the table.
    """

    law: str
    fit: Fit
    columns: Mapping[str, str]
    runs: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]
    noise_floor: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the fit as its own `to_dict`."""
        return {
            "law": self.law,
            "fit": self.fit.to_dict(),
            "columns": dict(self.columns),
            "runs": list(self.runs),
            "left_out": {reason: list(names) for reason, names in self.left_out.items()},
            "noise_floor": self.noise_floor,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TableFit:
        """What `to_dict` gave. Raises UserError where it is something else."""
        try:
            left_out = {reason: tuple(names) for reason, names in data["left_out"].items()}
            rest = (data["columns"], tuple(data["runs"]), left_out, data["noise_floor"], tuple(data["notes"]))
            return cls(data["law"], read_fit(data["fit"]), *rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"fits: an entry is damaged ({error}); fit the table again") from None


def read_fit(data: Mapping[str, Any]) -> Fit:
    """A fit from what its `to_dict` gave. Raises UserError for a law that is not known."""
    law = data.get("law")
    if law not in FITS:
        raise UserError(f"fits: law {law!r} is not known; choose one of {', '.join(FITS)}")
    return FITS[law].from_dict(data)


def fit_table(
    table: pd.DataFrame,
    law: str,
    *,
    columns: Mapping[str, str] | None = None,
    options: FitOptions | None = None,
    **settings: Any,
) -> TableFit:
    """Fits a law to the rows of a table that may be fitted together.

    Args:
        table: as `read_table` gives it.
        law: one of `LAWS`.
        columns: the table's own names for `n`, `d`, `c`, `loss`, `unique`, `experts`, `granularity`, `lr`, `score`; and
            `x` for power (n, d, c, or a column).
        options: of the fit.
        settings: arguments of the law's fit: `E`, `tied`, `base`, `Es`, `Em`, `shared_exponents`.

    Raises:
        UserError: what `choose_rows`, `inputs_of` and the law's fit refuse.
    """
    columns = dict(columns or {})
    if law not in LAWS:
        raise UserError(f"law {law!r}: no such law; choose one of {', '.join(LAWS)}")
    _check_columns(table, law, columns)
    chosen = choose_rows(table, columns, ("lr", "fit") if law == "lr" else ("fit",), law)
    inputs = inputs_of(law, chosen.rows, columns)
    if law == "lr":
        inputs = _sweeps(chosen, inputs)
    elif chosen.cluster is not None:
        settings = {"cluster": np.array(chosen.cluster), **settings}
    if law == "link" and settings.get("E") is None:
        raise UserError("link: E: the irreducible loss is needed; give that of a law fitted to the same losses")
    _check_settings(law, settings)
    fit = LAWS[law](**inputs, options=options, **settings)
    loss = columns.get("loss", COLUMNS["loss"])
    floor = None
    if chosen.cluster is not None and loss in chosen.rows.columns:
        floor, _ = noise_floor(column_numbers(chosen.rows, loss), chosen.cluster)
    notes = (*chosen.notes, *(_lengths(chosen, columns) if law == "power" else ()))
    return TableFit(law, fit, {**COLUMNS, **columns}, chosen.names, chosen.left_out, floor, notes)


def _check_settings(law: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError for arguments that the law's fit does not have."""
    parameters = inspect.signature(LAWS[law]).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return  # it refuses them itself
    allowed = {parameter.name for parameter in parameters}
    unknown = sorted(set(settings) - allowed)
    if unknown:
        raise UserError(f"{law}: {', '.join(unknown)}: this law has no such argument; leave it out")


def _lengths(chosen: Chosen, columns: Mapping[str, str]) -> tuple[str, ...]:
    """A power law in size alone takes runs of one length."""
    length = columns.get("d", COLUMNS["d"])
    if columns.get("x", "n") != "n" or length not in chosen.rows.columns:
        return ()
    if num_sizes(column_numbers(chosen.rows, length)) == 1:
        return ()
    return ("The runs are of several lengths: a power law in size alone mixes them; chinchilla has a term of each.",)


def _check_columns(table: pd.DataFrame, law: str, columns: Mapping[str, str]) -> None:
    """Columns that the user names must be there, before rows are looked at."""
    missing = [name for key, name in columns.items() if name not in table.columns and key != "x"]
    if missing:
        raise UserError(
            f"{law}: columns {', '.join(missing)} are missing; there are {', '.join(map(str, table.columns))}"
        )


def _sweeps(chosen: Chosen, inputs: dict[str, Any]) -> dict[str, Any]:
    """Rows at sizes and lengths with a sweep. D stays where one size was swept at several lengths."""
    if "role" in chosen.rows.columns:
        swept = texts(chosen.rows["role"]) == "lr"
        places = set(zip(inputs["N"][swept], inputs["D"][swept], strict=True))
        use = np.array([place in places for place in zip(inputs["N"], inputs["D"], strict=True)], bool)
        inputs = {name: values[use] for name, values in inputs.items()}
    lengths = {size: set(inputs["D"][inputs["N"] == size]) for size in inputs["N"]}
    if all(len(found) == 1 for found in lengths.values()):
        inputs.pop("D")
    return inputs


def hold_out_table(
    table: pd.DataFrame,
    law: str,
    *,
    columns: Mapping[str, str] | None = None,
    options: FitOptions | None = None,
    **settings: Any,
) -> HeldOut:
    """Fits the rows of role `fit` and predicts those of role `hold_out`; `rows` of the result count both.

    Raises:
        UserError: as `fit_table`; no rows of role `hold_out`; a law that predicts no loss.
    """
    chosen = choose_rows(table, columns, ("fit", "hold_out"), law)
    if "role" not in chosen.rows.columns or not (chosen.rows["role"] == "hold_out").any():
        raise UserError("hold-out: no finished run has the role hold_out; name such runs in the study")
    given = inputs_of(law, chosen.rows, columns or {})
    held = (chosen.rows["role"] == "hold_out").to_numpy()
    return hold_out(law, given, held, cluster=chosen.cluster, options=options, **settings)


def rolling_table(
    table: pd.DataFrame,
    law: str,
    *,
    columns: Mapping[str, str] | None = None,
    options: FitOptions | None = None,
    **settings: Any,
) -> tuple[HeldOut, ...]:
    """Predicts each size from all smaller ones, the largest last (`rolling`). Raises UserError as `fit_table`."""
    chosen = choose_rows(table, columns, ("fit",), law)
    given = inputs_of(law, chosen.rows, columns or {})
    return rolling(law, given, cluster=chosen.cluster, options=options, **settings)
