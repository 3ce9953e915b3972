"""Forward, backward and update under DeepSpeed, with ZeRO, expert parallelism, precision and clipping."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from mepa_ds.checkpoint.fragment import EMA, EXP_AVG, EXP_AVG_SQ, MASTER
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.distributed import spans_nodes
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.compilation import compile_blocks, compiles, uncompiled
from mepa_ds.engine.expert_parallel import mark_expert_parameters, shard_experts
from mepa_ds.engine.fragments import flat_partitions
from mepa_ds.engine.gradients import gather_directly, gathers_directly, take_over_norm
from mepa_ds.engine.optimizer import build_optimizer
from mepa_ds.engine.starting.initial_weights import UnroundedWeights, load_initial_weights
from mepa_ds.engine.starting.lean_start import NothingDrawn, leave_out_needless_work, materialise
from mepa_ds.engine.waiting import WaitingClock
from mepa_ds.models.adapting.freezing import freeze
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.moved.names import moved_name
from mepa_ds.objective.objective import Losses, ModelInputs, PretrainingObjective

_RETIRED_COLLECTIVES = (
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor|_all_gather_base|_reduce_scatter_base)` "
)


class Update(NamedTuple):
    """The result of an optimizer step."""

    grad_norm: float
    """The global norm before clipping; NaN if it is not known."""
    applied: bool
    """False if a gradient was not finite."""


class PretrainEngine:
    """Builds the sharded objective and trains it. Needs an initialised process group (one rank is enough).

    resumes: a checkpoint will be loaded, so `config.init_weights` is not read and need not exist any more.
    class_names: of the data, by label.
    """

    def __init__(
        self,
        config: PretrainConfig,
        teacher_width: int | None,
        device: torch.device,
        resumes: bool = False,
        class_names: tuple[str, ...] = (),
    ):
        self.device = device
        deepspeed_logger.setLevel(logging.ERROR)
        # DeepSpeed makes these calls: newer versions of PyTorch would warn of each after every evaluation and export.
        warnings.filterwarnings("ignore", _RETIRED_COLLECTIVES, FutureWarning)
        leave_out_needless_work()
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed requires it, even for one process
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.waits = WaitingClock()
        """Of this step: how long this rank waited for other ranks' tokens ("all_to_all") and counts ("counts")."""
        with torch.device("meta"), NothingDrawn():
            transformer = NextScaleTransformer(config.model)
            transformer.class_names = class_names
            transformer.recompute = config.parallel.activation_checkpointing
            objective = PretrainingObjective(transformer, config.objective, teacher_width, self._sum_over_ranks)
            shard_experts(objective, config.parallel.ep_size, self.waits)
        materialise(objective, device)
        mark_expert_parameters(objective)
        objective.init_weights(config.seed, config.optim.mup_base_width)
        unrounded: UnroundedWeights | None = None
        if config.init_weights is not None and not resumes:
            load_initial_weights(objective.transformer, config.init_weights, config.init_missing)
            unrounded = UnroundedWeights(objective) if config.parallel.precision != "fp32" else None
        freeze(objective, config.optim.freeze)
        self._compiled = compiles(config.parallel.compile, config.parallel.activation_checkpointing, device)
        if self._compiled:
            compile_blocks(objective.transformer)
        settings = deepspeed_config.build(config, dist.get_world_size(), device.type == "cuda" and spans_nodes())
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(objective, config.optim, config.model.C),
            config=settings,
            dist_init_required=False,
        )
        take_over_norm(self.zero)
        if gathers_directly(settings, dist.get_world_size()):
            gather_directly(self.zero)
        # DeepSpeed would end the run when the loss scale cannot fall any more, but the run has its own guard for that.
        if hasattr(self.zero.loss_scaler, "raise_error_at_min_scale"):
            self.zero.loss_scaler.raise_error_at_min_scale = False
        if unrounded is not None:
            unrounded.fill(self.objective, flat_partitions(self.zero, MASTER))
        self._ema_decay = config.optim.ema
        self._ema = [flat.clone() for flat in flat_partitions(self.zero, MASTER)] if self._ema_decay else []
        self._balance_over_step = config.objective.balance_over == "step"

    @property
    def objective(self) -> PretrainingObjective:
        return self._engine.module

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer; the checkpoint reads its partitions."""
        return self._engine.optimizer

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors that exist for every parameter, as a checkpoint stores them."""
        return (MASTER, EXP_AVG, EXP_AVG_SQ) + ((EMA,) if self._ema_decay else ())

    def flats(self, kinds: tuple[str, ...]) -> dict[str, list[Tensor]]:
        """Returns kind -> this rank's flat fp32 partitions, one per group. Writing into them changes the state."""
        return {kind: self._ema if kind == EMA else flat_partitions(self.zero, kind) for kind in kinds}

    @property
    def can_overflow(self) -> bool:
        """Whether a gradient that is not finite may just mean that the loss scale must come down (fp16)."""
        scaler = self.zero.loss_scaler
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

    def begin_step(self, timed: bool = False) -> None:
        """Starts a step. `timed` says whether this rank's waits for others are measured in it."""
        self._counts_NE: Tensor | None = None
        self.waits.start(timed)

    def forward(self, inputs: ModelInputs) -> Losses:
        """Returns one micro-batch's losses. Collective: tokens travel to their experts."""
        if self._balance_over_step:
            inputs = replace(inputs, earlier_counts_NE=self._counts_NE)
        losses: Losses = self._engine(inputs)
        if losses.counts_NE is not None:
            self._counts_NE = losses.counts_NE if self._counts_NE is None else self._counts_NE + losses.counts_NE
        return losses

    def backward(self, losses: Losses) -> Losses:
        """Adds a micro-batch's gradients to the step's; returns the losses without their graph. Collective."""
        self._engine.backward(losses.total)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # here DeepSpeed only counts micro-batches
        return losses.detached()

    def update(self, lr: float) -> Update:
        """Clips the gradients to a global norm of optim.clip, which DeepSpeed's config holds; updates the weights.

        `lr` is the schedule's rate. Under muP some groups of weights have a fraction of it.

        When a gradient is not finite on any rank, weights and moments stay as they were. Collective.
        """
        assert self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._engine.step()
        applied = self._engine.was_step_applied()
        if applied:
            self._after_update(self._counts_NE)
        norm = self._engine.get_global_grad_norm()
        return Update(float("nan") if norm is None else float(norm), applied)

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        if dist.get_world_size() > 1:
            with self.waits.waiting("counts"):
                dist.all_reduce(counts)
        return counts

    def _after_update(self, counts_NE: Tensor | None) -> None:
        if counts_NE is not None:
            self.objective.update_balance_bias(counts_NE)
        if self._ema_decay:
            masters = flat_partitions(self.zero, MASTER)
            torch._foreach_lerp_(self._ema, masters, 1 - self._ema_decay)

    def restored(self, average_too: bool) -> None:
        """Takes over partitions that were read from a checkpoint. `average_too`: the average was read as well."""
        self.zero.update_lp_params()
        if self._ema_decay and not average_too:
            self._ema = [flat.clone() for flat in flat_partitions(self.zero, MASTER)]

    @contextmanager
    def evaluating(self) -> Iterator[NextScaleTransformer]:
        """Yields the transformer without gradients, then restores training mode. Runs uncompiled, as sizes vary."""
        transformer = self.objective.transformer.eval()
        try:
            with torch.no_grad(), uncompiled(self._compiled):
                yield transformer
        finally:
            transformer.train()


def __getattr__(name: str) -> Any:
    """What this module had before version 0.2; to be deleted with version 0.3."""
    return moved_name("engine.engine", name)
