"""`mepa scale predict`: the best model of the family for a budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mepa_ds import log
from mepa_ds.cli.scale.moe_option import MoEText, moe_of
from mepa_ds.command_line.tables import aligned
from mepa_ds.config.base import validate
from mepa_ds.config.model import MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.scaling.candidates import FamilyModel, family_models, study_models, study_moe, study_sizes
from mepa_ds.scaling.family import VAR_DEPTHS
from mepa_ds.scaling.fit_files import read_fits
from mepa_ds.scaling.fits import TableFit
from mepa_ds.scaling.predict import Candidate, Prediction, predict
from mepa_ds.scaling.report.document import find_document, input_columns, stale
from mepa_ds.scaling.study.config import Budget, StudyConfig
from mepa_ds.scaling.study.plan import read_lr_law

_DENSE_LAWS, _MOE_LAWS = ("data", "chinchilla"), ("joint-moe", "data", "chinchilla")


@dataclass
class PredictOptions:
    """The best size of the real family for a budget: for each size, the images that the budget pays for by its counted
    FLOPs (attention and head too, never 6 N D), epochs, learning rate and batch, and the loss that a fitted law says,
    with its 95 % interval. The size of least loss is marked; `best in` is the share of the bootstrap's draws in which
    it is the best. Warnings say where this is an extrapolation."""

    source: tyro.conf.Positional[Path]
    """Study file or its output_dir, once fit or report has run; or a fits.json."""
    flops: float | None = None
    """Model FLOPs of the whole run, such as 1e21."""
    gpu_hours: float | None = None
    """Or device-hours, at the speed of the study's budget, or of --device and --mfu."""
    device: str | None = None
    """With --gpu-hours: H100, A100, ... in place of the study's."""
    mfu: float | None = None
    """With --gpu-hours: share of the device's peak, in place of the study's."""
    law: str | None = None
    """A law of the fits [default: data if it was fitted, else chinchilla; with experts joint-moe before these]."""
    sizes: tuple[str, ...] = ()
    """Sizes to choose from [default: the study's, and d8 to d36 if these are of VAR's ladder]."""
    moe: MoEText | None = None
    """dense, or experts as num_experts=8,top_k=2 [default: the study's; dense if it has dense runs]."""
    unique_images: int | None = None
    """Images of the training set, for epochs and the law data [default: the study's largest]."""
    json: bool = False
    """For programs: all candidates, the best, the warnings."""


def main(argv: list[str]) -> None:
    options = tyro.cli(PredictOptions, prog="mepa scale predict", args=argv)
    path, study = find_document(options.source)
    document = {"refused": {}, "unique_images": None, **read_fits(path)}
    flops = _flops(options, study)
    moe = study_moe(study) if options.moe is None and study else moe_of(options.moe or "dense")
    name = _law_name(options.law, document, moe, path)
    if options.unique_images is not None and options.unique_images < 1:
        raise UserError(f"--unique-images {options.unique_images}: expected at least 1")
    unique = _unique_images(document) if options.unique_images is None else options.unique_images
    models = _models(options.sizes, study, moe)
    entry: TableFit = document["laws"][name]
    found = predict(entry.fit, input_columns(entry.fit, entry.columns), models, flops, unique)
    warnings = [*stale(document), *found.warnings]
    if options.json:
        log.say(json.dumps({**found.to_dict(), "warnings": warnings, "fits": str(path)}, indent=1))
    else:
        log.say(format_prediction(found, path, warnings))


def _flops(options: PredictOptions, study: StudyConfig | None) -> float:
    if (options.flops is None) == (options.gpu_hours is None):
        raise UserError("give one of --flops and --gpu-hours")
    if options.flops is not None:
        return options.flops
    values: dict[str, Any] = study.budget.model_dump() if study else {}
    if options.device is not None:
        values |= {"device": options.device, "flops_per_second": None, "hours": None}
    if options.mfu is not None:
        values["mfu"] = options.mfu
    budget = validate(Budget, values, "--device and --mfu")
    assert options.gpu_hours is not None
    if budget.speed is None:
        raise UserError(
            "--gpu-hours needs the speed of a device; give --device and --mfu, or the study's budget.device"
        )
    if options.gpu_hours <= 0:
        raise UserError(f"--gpu-hours {options.gpu_hours:g}: expected a number above 0")
    return options.gpu_hours * 3600 * budget.speed


def _law_name(asked: str | None, document: Mapping[str, Any], moe: MoEConfig | None, path: Path) -> str:
    laws = document["laws"]
    wanted = (asked,) if asked else _MOE_LAWS if moe else _DENSE_LAWS
    for name in wanted:
        if name in laws:
            return name
    reason = next((f" ({document['refused'][name]})" for name in wanted if name in document["refused"]), "")
    raise UserError(
        f"{path}: no law {' or '.join(wanted)} there{reason}; it has {', '.join(laws) or 'none'}: choose one with "
        "--law, or fit it"
    )


def _unique_images(document: Mapping[str, Any]) -> int | None:
    """The largest training set of the table's runs."""
    value = document["unique_images"]
    return None if value is None else int(value)


def _models(sizes: Sequence[str], study: StudyConfig | None, moe: MoEConfig | None) -> list[FamilyModel]:
    if study is None:
        return family_models(sizes or [f"d{depth}" for depth in VAR_DEPTHS], moe, {})
    return study_models(study, sizes or study_sizes(study), moe, read_lr_law(study))


def format_prediction(found: Prediction, path: Path, warnings: Sequence[str]) -> str:
    """Returns the prediction as a person reads it."""
    lines = [f"{found.flops:.4g} model FLOPs, law {found.law} of {path}"]
    lines += aligned([_HEAD, *(_cells(candidate, candidate is found.best) for candidate in found.candidates)])
    best = found.best
    within = "" if best.interval is None else f" (95 %: {best.interval[0]:.4f} to {best.interval[1]:.4f})"
    lines.append(f"best: {best.model.size}, {best.images} images, loss {best.loss:.4f}{within}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings)])


_HEAD = (
    "", "size", "N matrix", "active", "GFLOP/image", "images", "epochs", "steps", "batch", "peak lr", "loss",
    "95 % interval", "best in",
)  # fmt: skip


def _cells(candidate: Candidate, is_best: bool) -> tuple[str, ...]:
    model = candidate.model
    return (
        "*" if is_best else "",
        model.size,
        f"{model.params_matrix / 1e6:.4g}M",
        f"{model.params_active / 1e6:.4g}M",
        f"{model.image_flops / 1e9:.4g}",
        str(candidate.images),
        "" if candidate.epochs is None else f"{candidate.epochs:.3g}",
        "" if candidate.steps is None else str(candidate.steps),
        "" if model.batch is None else str(model.batch),
        "" if model.lr_peak is None else f"{model.lr_peak:.2e}",
        f"{candidate.loss:.4f}",
        "" if candidate.interval is None else "{:.4f} to {:.4f}".format(*candidate.interval),
        "" if candidate.share_best is None else f"{candidate.share_best:.0%}",
    )
