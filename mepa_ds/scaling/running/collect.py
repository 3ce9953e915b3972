"""`mepa scale collect`: what the runs of a study measured, as one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from mepa_ds.checkpoint.files import list_checkpoints
from mepa_ds.checkpoint.state import RunState, read_state
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path
from mepa_ds.models.summary import count_parameters
from mepa_ds.runtime.metrics import as_written, read_metrics
from mepa_ds.runtime.schedule import phase_steps
from mepa_ds.safety.reading import read_json_object
from mepa_ds.scaling.columns import COLUMNS, SCORES
from mepa_ds.scaling.family import model_facts
from mepa_ds.scaling.running.members import Member, member_of, recipe_hash
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import read_plan, resolved

TABLE_NAME = "table"
SCORES_NAME = "scores.json"
"""Beside a run's records, where `mepa evaluate ... --json` wrote its scores."""
_ENDED = ("finished", "failed", "diverged")


def collect(study: StudyConfig) -> pd.DataFrame:
    """Writes table.csv and table.parquet to the study's output_dir and returns the table; columns: `COLUMNS`.

    Every run of the plan has a row; what a run has not measured yet is missing in its row.

    Raises:
        UserError: the study is not planned, or a finished run lacks the score of its last weights.
    """
    rows = [_row(study, member_of(row)) for row in read_plan(study)]
    names = [*COLUMNS, *sorted({key for row in rows for key in row} - COLUMNS.keys(), key=_order)]
    table = pd.DataFrame(rows, columns=names)
    for suffix in (".csv", ".parquet"):
        with atomic_path(study.output_dir / f"{TABLE_NAME}{suffix}") as temporary:
            # Floats are written in full: a fit of the CSV is the fit of the Parquet.
            table.to_csv(temporary, index=False) if suffix == ".csv" else table.to_parquet(temporary, index=False)
    return table


def _order(name: str) -> tuple[str, int]:
    head, _, number = name.rpartition("_")
    return (head, int(number)) if number.isdigit() else (name, 0)


def _row(study: StudyConfig, member: Member) -> dict[str, Any]:
    row, directory = member.row, Path(member.row["output_dir"])
    config: PretrainConfig | None = resolved(row) if Path(row["recipe"]).is_file() else None
    values: dict[str, Any] = {
        "study": study.name,
        **{key: row[key] for key in ("run", "group", "role", "kind", "seed", "samples", "tokens", "unique_images")},
        **{key: row[key] for key in ("epochs", "batch", "steps", "lr_peak")},
        "flops_model": row["flops"],
        "status": member.state if member.state in _ENDED else "running",
    }
    if config is None:  # its learning rate waits for the sweep
        return values
    values |= _of_recipe(config, row)
    values |= _of_data(config)
    values |= _of_checkpoint(directory)
    values |= _of_records(directory, config, row)
    values |= _of_scores(directory)
    if member.state == "finished" and "loss" not in values:
        raise UserError(
            f"{directory}: is finished, but metrics.jsonl has no held-out score of step {row['steps']}, its last; "
            "remove the directory and run the study again"
        )
    return values


def _of_recipe(config: PretrainConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    model = config.model
    facts = model_facts(model, count_parameters(model))
    return {
        "recipe_hash": recipe_hash(json.loads(config.model_dump_json())),
        **facts,
        "granularity": 4 * model.C / facts["expert_hidden"] if model.moe else 1.0,
        "warmup": phase_steps(config.optim, row["steps"])[0],
        "schedule": config.optim.schedule,
        "cooldown": config.optim.cooldown if config.optim.schedule == "wsd" else None,
        "weight_decay": config.optim.weight_decay,
        "scales": ",".join(map(str, model.scales)),
    }


def _of_data(config: PretrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tokens, heldout = config.data.tokens, config.data.heldout_tokens
    if tokens is not None and (tokens / INDEX_NAME).is_file():
        found["tokenizer_hash"] = ShardIndex.read(tokens).made_by.identity
    if heldout is not None and (heldout / INDEX_NAME).is_file():
        found["heldout_images"] = ShardIndex.read(heldout).num_samples
    return found


def _of_checkpoint(directory: Path) -> dict[str, Any]:
    state = RunState()
    for path in list_checkpoints(directory / "checkpoints")[-1:]:
        with suppress(UserError):
            state = read_state(path)
    identities = {key: value for key, value in state.data.items() if key != "seed"}
    return {
        "code_version": state.versions.get("mepa_ds"),
        "heldout_hash": state.heldout or None,
        "data_hash": "; ".join(f"{key}: {value}" for key, value in sorted(identities.items())) or None,
    }


def _of_records(directory: Path, config: PretrainConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    path = directory / "metrics.jsonl"
    with as_written(path):
        return _measured([record for record in read_metrics(path) if "event" in record], config, row)


def _measured(records: list[dict[str, Any]], config: PretrainConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if starts := [record for record in records if record["event"] == "start"]:
        step_flops = row["flops"] / row["steps"]
        projector = max(starts[-1]["step_flops"] - step_flops, 0.0) if config.objective.alignment else 0.0
        values |= {"ranks": starts[-1]["world_size"], "device": starts[-1].get("device")}
        values["flops_projector"] = projector * row["steps"]
    if train := [record for record in records if record["event"] == "train"]:
        values["seconds"] = training_seconds(row, records)
        values["train_loss"] = train[-1]["ce"]
    heldout = heldout_of(row, records)
    if heldout is not None:
        values |= {"loss": heldout["ce"], "loss_last": heldout["ce_last"], "weights_step": heldout["step"]}
        values |= {"accuracy": heldout["accuracy"], "accuracy_last": heldout["accuracy_last"]}
        for scale, (ce, accuracy) in enumerate(
            zip(heldout["ce_scale"], heldout["accuracy_scale"], strict=True), start=1
        ):
            values |= {f"loss_scale_{scale}": ce, f"accuracy_scale_{scale}": accuracy}
    return values


def training_seconds(row: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds of a run's own training steps, all starts."""
    train = [record for record in records if record["event"] == "train"]
    steps_before = [row["first_step"], *(record["step"] for record in train)]
    spans = zip(train, steps_before, strict=False)
    return float(sum(record["mean_step_seconds"] * (record["step"] - before) for record, before in spans))


def heldout_of(row: Mapping[str, Any], records: Sequence[Mapping[str, Any]] | None = None) -> Mapping[str, Any] | None:
    """Returns the held-out scores of a run's last weights; None if it has not come to its last step."""
    if records is None:
        records = list(read_metrics(Path(row["output_dir"]) / "metrics.jsonl"))
    found = [record for record in records if record.get("event") == "heldout" and record.get("step") == row["steps"]]
    return found[-1] if found else None


def _of_scores(directory: Path) -> dict[str, Any]:
    """Returns the scores of generated images, if `mepa evaluate` has written any beside the run."""
    scores: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        scores = read_json_object(directory / SCORES_NAME)
    named = {"is": scores.get("inception_score"), **scores}
    return {key: named[key] for key in SCORES if isinstance(named.get(key), (int, float))}
