"""Variants of a base recipe: what ablations and sweeps train, and the rows of their plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mepa_ds.config.base import set_key, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.errors import UserError
from mepa_ds.models.summary import count_parameters
from mepa_ds.objective.flops import image_flops
from mepa_ds.scaling.study.runs import diverged_above


def variant(
    base: Mapping[str, Any], changes: Mapping[str, Any], number: int, output_dir: Path, where: str
) -> PretrainConfig:
    """Returns the base recipe with `changes` (values by dotted key) and its seed plus `number`.

    The run is evaluated at its end, scored too if the recipe says how, and ends early if it diverges.

    Raises:
        UserError: a key or value is wrong (the message begins with `where`), or there is no held-out set.
    """
    values: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in changes.items():
        set_key(values, key, value, f"{where}: {key}")
    values["seed"] = int(base.get("seed", 0)) + number
    values["output_dir"] = str(output_dir)
    config = validate(PretrainConfig, values, where)
    if config.data.heldout_tokens is None:
        raise UserError(f"{where}: data.heldout_tokens: runs are compared on held-out images; name their set")
    steps = config.train.num_steps(num_samples(config))
    log = {"evaluate_every": steps, "checkpoint_every": min(config.log.checkpoint_every, steps)}
    if config.log.score is not None:
        log["score_every"] = steps
    values["log"] = (values.get("log") or {}) | log
    limit = config.guards.diverged_above or diverged_above(config.model)
    values["guards"] = (values.get("guards") or {}) | {"diverged_above": limit}
    return validate(PretrainConfig, values, where)


def num_samples(config: PretrainConfig) -> int:
    """Returns the images of an epoch; 1 where only a length in epochs would need them."""
    if config.train.epochs is None:
        return 1
    found = config.data.tokens or config.data.images
    assert found is not None
    return config.data.unique_images or ShardIndex.read(found).num_samples


def plan_row(name: str, config: PretrainConfig, recipe: Path) -> dict[str, Any]:
    """Returns the row of a run in plan.json; `recipe` is where its recipe is written."""
    counts, of_image = count_parameters(config.model), sum(image_flops(config.model).values())
    steps = config.train.num_steps(num_samples(config))
    samples = steps * config.train.global_batch
    return {
        "run": name,
        "role": "fit",
        "seed": config.seed,
        "steps": steps,
        "samples": samples,
        "params_total": counts.total,
        "params_active": counts.active,
        "flops_image": of_image,
        "paid_flops": of_image * samples,
        "first_step": 0,
        "branches_off": None,
        "waits_for_sweep": False,
        "recipe": str(recipe),
        "output_dir": str(config.output_dir),
    }
