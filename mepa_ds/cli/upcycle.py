"""`mepa upcycle`: a mixture-of-experts model from a dense one's weights, or from a mixture of other experts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.scales import Scales
from mepa_ds.config.base import validate
from mepa_ds.config.model import MoEConfig
from mepa_ds.errors import UserError

if TYPE_CHECKING:
    from mepa_ds.models.transformer import NextScaleTransformer

_OF_THE_MIXTURE = ("expert_ratio", "renormalize", "every", "shared_expert", "router")
"""Options that a mixture's weights have decided."""


@dataclass
class UpcycleOptions:
    """Every FFN becomes experts: copies of it, or slices where experts are narrower. The router is new.

    With copies the new model gives the dense model's output to rounding. With slices it does so if top_k of them (and
    the shared expert) cover the FFN and top_k divides num_experts. Start training from the result with `pretrain.py
    RECIPE init_weights=OUT`; the recipe's model.moe must be the same.

    Of a mixture, experts are copied to more (their routers' rows with a little noise), or, with --run, the most used
    are kept.
    """

    weights: Path
    """A directory of safetensors + config.json, VAR's var_d16.pth, or any other file that has its weights."""
    out: Path
    """Directory of the new model."""
    scales: Scales = None
    """Sides of the token maps, such as 1 2 3 4, if VAR weights do not tell them and they are not VAR's own."""
    num_heads: int | None = None
    """Number of attention heads, if VAR weights do not tell it (those without QK normalisation)."""
    depth: int | None = None
    """Number of blocks, if VAR weights do not tell it and it is not width / 64."""
    num_experts: int = 8
    """Routed experts."""
    top_k: int | None = None
    """Routed experts that each token sees; without it 2, or a mixture's own number."""
    expert_ratio: float | None = None
    """Hidden width of an expert as a multiple of C: 4 (without it) copies VAR's FFN, 1.333 makes iso-FLOP slices."""
    renormalize: bool = False
    """Divide the chosen experts' probabilities by their sum. A mixture goes on as it does."""
    every: int | None = None
    """Every n-th block becomes MoE, the others keep their FFN; without it each."""
    shared_expert: bool = True
    """One more expert that sees every token. A mixture keeps what it has."""
    router: Literal["stmoe", "smoe", "token"] | None = None
    """See model.moe.router of `pretrain.py --help`; without it stmoe, or a mixture's own."""
    run: Path | None = None
    """Fewer experts than a mixture has: the directory of the run that trained it, whose last record of routing says
    which are used most."""
    seed: int = 0
    """Seed of the new router's weights."""


def main(argv: list[str]) -> None:
    options = tyro.cli(UpcycleOptions, prog="mepa upcycle", args=argv)
    log.make_stdout_a_log()
    from mepa_ds.files import check_writable
    from mepa_ds.models.summary import count_parameters
    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.weights.file_checks import check_finite

    old = NextScaleTransformer.open(options.weights, options.scales, num_heads=options.num_heads, depth=options.depth)
    moe = _wanted(options, old.config.moe)
    if options.out.resolve() == options.weights.resolve():
        raise UserError(f"--out: {options.out} is --weights, which would be replaced; choose another directory")
    check_writable(options.out, "--out")
    check_finite(old.state_dict(), str(options.weights))
    if old.config.moe is None:
        from mepa_ds.models.upcycling import upcycle

        if options.run is not None:
            raise UserError(f"--run: {options.weights} is dense, it has no experts to choose from; leave --run out")
        model = upcycle(old, moe, options.seed)
    else:
        model = _with_other_experts(old, moe, options)
    model.class_names = old.class_names
    model.save_pretrained(options.out)
    log.say(f"{options.out}: {count_parameters(model.config)} (from {count_parameters(old.config)})")


def _wanted(options: UpcycleOptions, theirs: MoEConfig | None) -> MoEConfig:
    """Raises UserError for options that a mixture's weights contradict."""
    defaults = UpcycleOptions(options.weights, options.out)
    given = (key for key in ("top_k", *_OF_THE_MIXTURE) if getattr(options, key) != getattr(defaults, key))
    values = {key: getattr(options, key) for key in given}
    if theirs is not None:
        for key in _OF_THE_MIXTURE:
            if key in values and values[key] != getattr(theirs, key):
                option = f"--{'no-' * (values[key] is False)}{key.replace('_', '-')}"
                raise UserError(
                    f"{option}: {options.weights} is a mixture with {key} {getattr(theirs, key)}, which its weights "
                    f"are made for; leave {option} out"
                )
        values = theirs.model_dump(mode="json") | values
    return validate(MoEConfig, {**values, "num_experts": options.num_experts}, "options")


def _with_other_experts(old: NextScaleTransformer, moe: MoEConfig, options: UpcycleOptions) -> NextScaleTransformer:
    from mepa_ds.models.adapting.experts import fewer_experts, more_experts, most_used
    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.models.transformer_files import with_weights

    theirs = old.config.moe
    assert theirs is not None
    config = old.config.model_copy(update={"moe": moe})
    if options.run is not None and moe.num_experts >= theirs.num_experts:
        raise UserError(
            f"--run: it chooses experts to keep, but {options.weights} has {theirs.num_experts}, and {moe.num_experts} "
            "are asked for; give a smaller --num-experts, or leave --run out"
        )
    if options.run is not None:
        blocks = [index for index in range(config.depth) if config.is_moe_block(index)]
        loads = _last_loads(options.run, blocks, (config.schedule.num_scales, theirs.num_experts))
        kept = most_used(loads, config.schedule.lengths, moe.num_experts)
        for block, experts in kept.items():
            log.say(f"block {block}: experts {', '.join(map(str, experts))} are kept")
        state = fewer_experts(old.state_dict(), kept)
    else:
        state = more_experts(old.state_dict(), moe.num_experts, options.seed)
    return with_weights(lambda: NextScaleTransformer(config), state, str(options.weights))


def _last_loads(run: Path, blocks: list[int], shape: tuple[int, int]) -> dict[int, list[list[float]]]:
    """Each block's load of (scale, expert) in the run's last record of routing.

    Raises:
        UserError: no such record, or one of another model.
    """
    from mepa_ds.runtime.metrics import METRICS_NAME, as_written, read_metrics

    path = run / METRICS_NAME
    if not path.is_file():
        raise UserError(f"--run: {run}: no {METRICS_NAME} there; give the directory of the run of these weights")
    with as_written(path):
        records = [record for record in read_metrics(path) if record.get("event") == "routing"]
        if not records:
            raise UserError(f"--run: {path} has no record of routing; give the directory of the run of these weights")
        loads = {int(block): layer["load_scale"] for block, layer in records[-1]["layers"].items()}
        if sorted(loads) != blocks or any(
            {(len(load), len(row)) for row in load} != {shape} for load in loads.values()
        ):
            raise UserError(
                f"--run: {path} is of another model: expected loads of {shape[0]} scales and {shape[1]} experts in "
                f"blocks {', '.join(map(str, blocks))}; give the directory of the run of these weights"
            )
        return {block: [[float(share) for share in row] for row in load] for block, load in loads.items()}


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
