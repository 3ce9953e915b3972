"""One optimizer step under DeepSpeed: ZeRO, expert parallelism, precision, clipping."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.expert_parallel import mark_expert_parameters, shard_experts
from mepa_ds.engine.fragments import set_adam_step
from mepa_ds.engine.optimizer import build_optimizer
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.pretraining import Losses, ModelInputs, PretrainingObjective


@dataclass
class StepReport:
    """`losses` has one entry a micro-batch of this rank; `grad_norm` is global and before clipping."""

    losses: list[Losses]
    grad_norm: float
    applied: bool


def _sum_over_ranks(counts: Tensor) -> Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts


class PretrainEngine:
    """Builds the sharded objective and steps it. Needs an initialised process group (one rank is fine)."""

    def __init__(self, config: PretrainConfig, teacher_width: int | None, device: torch.device):
        deepspeed_logger.setLevel(logging.ERROR)
        # On a CPU the shared-memory op would be compiled at start (33 s), and crash without g++.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists on it, even for one process
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        with torch.device("meta"):
            transformer = NextScaleTransformer(config.model)
            transformer.recompute = config.parallel.activation_checkpointing
            objective = PretrainingObjective(transformer, config.objective, teacher_width, _sum_over_ranks)
            shard_experts(objective, config.parallel.ep_size)
        objective.to_empty(device=device)
        mark_expert_parameters(objective)
        objective.init_weights(config.seed)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(objective, config.optim),
            config=deepspeed_config.build(config, dist.get_world_size()),
            dist_init_required=False,
        )
        self.accumulation = config.train.accumulation
        self._balance_over_step = config.objective.balance_over == "step"

    @property
    def objective(self) -> PretrainingObjective:
        return self._engine.module

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer; the checkpoint reads its partitions."""
        return self._engine.optimizer

    def step(self, micro_batches: Iterable[ModelInputs], lr: float) -> StepReport:
        """Forward and backward over `accumulation` micro-batches, then one optimizer step at rate `lr`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        losses = []
        counts_NE: Tensor | None = None
        for inputs in micro_batches:
            if self._balance_over_step:
                inputs = replace(inputs, earlier_counts_NE=counts_NE)
            result: Losses = self._engine(inputs)
            self._engine.backward(result.total)
            self._engine.step()
            losses.append(result)
            if result.counts_NE is not None:
                counts_NE = result.counts_NE if counts_NE is None else counts_NE + result.counts_NE
        assert len(losses) == self.accumulation
        if counts_NE is not None:
            self.objective.update_balance_bias(counts_NE)
        norm = self._engine.get_global_grad_norm()
        grad_norm = float("nan") if norm is None else float(norm)
        return StepReport(losses, grad_norm, not getattr(self._engine.optimizer, "overflow", False))

    def restored(self, adam_step: int) -> None:
        """To be called when the optimizer's partitions were written from outside (a checkpoint)."""
        zero = self._engine.optimizer
        set_adam_step(zero, adam_step)
        zero.update_lp_params()

    @contextmanager
    def evaluating(self) -> Iterator[NextScaleTransformer]:
        """The transformer without gradients; training state is as before afterwards."""
        transformer = self.objective.transformer.eval()
        try:
            with torch.no_grad():
                yield transformer
        finally:
            transformer.train()
