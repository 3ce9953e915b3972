"""Micro-batches that fit into a GPU's memory, by the plan of the run."""

from __future__ import annotations

from dataclasses import replace

from mepa_ds import log
from mepa_ds.config.base import parse_yaml, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts
from mepa_ds.project.recipes import pretrain_recipe

_HOST = 2e9


def with_fitting_batches(chosen: Choices, images: ImageFacts, machine: MachineFacts, layout: Layout) -> Choices:
    """The fewest micro-batches a step that the plan finds room for. A micro-batch is traced, which takes a while."""
    from mepa_ds.planning.plan import Machine, plan_run

    log.note("planning: how much memory a step needs (for a large model some ten seconds)")
    recipe = parse_yaml(pretrain_recipe(chosen, images, layout), "pretrain.yaml")
    config = validate(PretrainConfig, recipe, "pretrain.yaml")
    rank = Machine(chosen.ranks, is_gpu=True, memory=1e9 * machine.gpu_gigabytes, process=_HOST)
    plan = plan_run(config, rank, images.num_images)
    if plan.fitting_accumulation is None:
        log.note(f"warning: by the plan, {plan.problems[0]}")
    return replace(chosen, accumulation=plan.fitting_accumulation or chosen.batch // chosen.ranks)
