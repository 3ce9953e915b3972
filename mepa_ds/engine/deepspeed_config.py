"""DeepSpeed's config: the engine knobs come from a JSON file, everything else comes from the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mepa_ds import shipped
from mepa_ds.config.base import read_text, validate
from mepa_ds.config.engine_knobs import NO_KNOBS, NO_ZERO_KNOBS, Knobs
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.safety.reading import parse_json

# JSON keys that the recipe decides -> the recipe's keys for them.
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "parallel.precision",
    "fp16": "parallel.precision",
    "amp": "parallel.precision",
    "torch_autocast": "parallel.precision",
}


def read_knobs(path: Path) -> dict[str, Any]:
    """Reads the engine knobs, of a file that anybody may have made: only `Knobs` pass.

    Raises UserError for other keys, among them those that the recipe owns, and for settings that break experts.
    """
    path = shipped.find(path)
    text = read_text(path.absolute(), "parallel.deepspeed")
    where = f"parallel.deepspeed: {path}"
    try:
        knobs = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(knobs, dict) or not isinstance(knobs.get("zero_optimization", {}), dict):
        raise UserError(f'{where}: expected an object such as {{"zero_optimization": {{"stage": 2}}}}')
    for key, owner in OWNED.items():
        if key in knobs:
            raise UserError(f"{where}: {key!r} belongs into the recipe ({owner}); delete it here")
    zero = knobs.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        reason = "ZeRO-3 cannot partition expert-parallel layers" if stage == 3 else "masters are kept by ZeRO"
        raise UserError(f"{where}: zero_optimization.stage must be 1 or 2, got {stage!r} ({reason})")
    if zero.get("round_robin_gradients") or zero.get("offload_optimizer"):
        raise UserError(
            f"{where}: round_robin_gradients and offload_optimizer are not supported: "
            "checkpoints read ZeRO's partitions"
        )
    for key in ("reduce_scatter", "contiguous_gradients"):  # without the latter, stage 1 averages different experts
        if zero.get(key) is False:
            raise UserError(f"{where}: {key}: false does not work with experts; delete it here")
    for prefix, section, reasons in (("", knobs, NO_KNOBS), ("zero_optimization.", zero, NO_ZERO_KNOBS)):
        for key in sorted(section.keys() & reasons.keys()):
            raise UserError(f"{where}: {prefix}{key} is no engine knob: {reasons[key]}; delete it here")
    return validate(Knobs, knobs, where).model_dump(exclude_unset=True, exclude_none=True)


def zero_stage(path: Path) -> int:
    return int(read_knobs(path)["zero_optimization"]["stage"])


def build(config: PretrainConfig, world_size: int, overlaps: bool = False) -> dict[str, Any]:
    """Builds the dictionary for `deepspeed.initialize`.

    `overlaps`: gradients are reduced while the backward pass goes on, unless the engine knobs say otherwise.
    """
    micro_batch = config.train.global_batch // (world_size * config.train.accumulation)
    derived: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice in every micro-batch
    }
    if config.parallel.precision != "fp32":
        derived[config.parallel.precision] = {"enabled": True}
    knobs = read_knobs(config.parallel.deepspeed)
    accumulates_in = (knobs.get("data_types") or {}).get("grad_accum_dtype")
    if config.parallel.precision == "bf16" and accumulates_in == "fp32" and knobs["zero_optimization"]["stage"] == 1:
        raise UserError(
            f"parallel.deepspeed: {config.parallel.deepspeed}: grad_accum_dtype fp32 needs ZeRO stage 2 in bf16: with "
            "stage 1 DeepSpeed takes an optimizer that checkpoints cannot read; set zero_optimization.stage to 2"
        )
    if knobs["zero_optimization"]["stage"] == 2:
        knobs["zero_optimization"].setdefault("overlap_comm", overlaps)
    return knobs | derived
