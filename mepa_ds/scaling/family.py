"""`mepa scale family`: models of many sizes in numbers, without making one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig, MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.models.summary import ParameterCounts, count_parameters
from mepa_ds.objective.flops import image_flops
from mepa_ds.scaling.sizes import VAR_HEAD_WIDTH, ladder_values, size_values

VAR_DEPTHS = (8, 12, 16, 20, 24, 30, 36)
_BYTES = {"weights": 2, "gradients": 2, "masters and Adam moments": 12}
"""Of a parameter in bf16 under ZeRO-2: the weights on every rank, the rest shared out."""


def member(
    size: str, moe: MoEConfig | None, head_width: int = VAR_HEAD_WIDTH, settings: dict[str, Any] | None = None
) -> ModelConfig:
    """Returns the model of a size, dense or with experts. `settings` are further keys of a recipe's model.

    Raises:
        UserError: the size is none, or the model cannot be.
    """
    try:
        values = size_values(size, head_width) | ladder_values(size)
    except ValueError as error:
        raise UserError(f"--sizes: {error}") from None
    values |= {"moe": None if moe is None else moe.model_dump(mode="json")} | (settings or {})
    return validate(ModelConfig, values, size)


def family_row(size: str, model: ModelConfig, ranks: int = 1) -> dict[str, Any]:
    """Returns a model's parameters by kind, its FLOPs by part and its state in memory, as JSON has it.

    `flops` are of one image, forward and backward, by part; `state_bytes` are of a rank of `ranks` in bf16 under
    ZeRO-2, by part, without activations (`pretrain.py RECIPE --dry-run` has those).
    """
    counts = count_parameters(model)
    flops = image_flops(model)
    total = sum(flops.values())
    return {
        "size": size,
        "heads": model.H,
        **model_facts(model, counts),
        "tokens": model.schedule.num_tokens,
        "flops": flops,
        "flops_image": total,
        "flops_per_weight_and_token": total / (counts.matrix * model.schedule.num_tokens),
        "state_bytes": state_bytes(counts, ranks),
    }


def model_facts(model: ModelConfig, counts: ParameterCounts) -> dict[str, Any]:
    """Returns a model's shape and its parameters by kind, by the names of a table's columns."""
    return {
        "depth": model.depth,
        "width": model.C,
        "experts": model.moe.num_experts if model.moe else 0,
        "top_k": model.moe.top_k if model.moe else 0,
        "shared": model.moe.shared_expert if model.moe else False,
        "expert_hidden": model.expert_hidden if model.moe else model.dense_hidden,
        **{f"params_{field.name}": getattr(counts, field.name) for field in fields(counts)},
    }


def state_bytes(counts: ParameterCounts, ranks: int) -> dict[str, float]:
    """Returns the bytes of weights, gradients and optimizer state on each of `ranks`."""
    return {part: size * counts.total / (1 if part == "weights" else ranks) for part, size in _BYTES.items()}


def format_family(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table as a person reads it. Parameters in millions, FLOPs of an image in GFLOP."""
    head = (
        f"{'size':<12}{'total':>10}{'active':>10}{'matrix':>10}{'AdaLN':>9}{'embed':>8}{'experts':>10}"
        f"{'GFLOP/image':>13}{'attention':>11}{'C / ND':>8}{'state':>10}"
    )
    lines = ["parameters in millions; C / ND: counted FLOPs a matrix weight and token (6 without attention)", head]
    for row in rows:
        millions = [
            row[f"params_{kind}"] / 1e6 for kind in ("total", "active", "matrix", "adaln", "embedding", "experts")
        ]
        share = row["flops"]["attention"] / row["flops_image"]
        state = sum(row["state_bytes"].values()) / 1e9
        lines.append(
            f"{row['size']:<12}{millions[0]:>10.1f}{millions[1]:>10.1f}{millions[2]:>10.1f}{millions[3]:>9.1f}"
            f"{millions[4]:>8.1f}{millions[5]:>10.1f}{row['flops_image'] / 1e9:>13.1f}{share:>11.1%}"
            f"{row['flops_per_weight_and_token']:>8.2f}{state:>7.2f} GB"
        )
    return "\n".join(lines)
