"""Turns a loaded batch into the objective's inputs: codebook inputs, dropped labels, stochastic depth.

Shapes: B batch, L positions, D blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.config.model import ModelConfig
from mepa_ds.data.training import TrainingBatch
from mepa_ds.machine import copied_to
from mepa_ds.objective.objective import ModelInputs
from mepa_ds.random_streams import uniforms
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer


class InputMaker:
    """Makes model inputs.

    Random choices are a function of an image's position in the sample stream: the same on any number of ranks.
    """

    def __init__(self, config: ModelConfig, quantizer: MultiScaleQuantizer, seed: int, device: torch.device):
        self._config = config
        self._quantizer = quantizer.to(device)
        self._seed = seed
        self._device = device

    def training(self, batch: TrainingBatch, num_scales: int | None = None) -> ModelInputs:
        """Returns inputs of the first scales (None: all), with some labels dropped and some branches skipped."""
        positions_B = batch.positions_B.numpy()
        batch = batch.to(self._device)
        schedule = self._config.schedule
        end = schedule.bounds[(num_scales or schedule.num_scales) - 1][1]
        return ModelInputs(
            labels_B=self._drop_labels(batch.labels_B, positions_B),
            inputs_BLZ=self._quantizer.inputs_from_tokens(batch.tokens_BL)[:, : end - schedule.lengths[0]],
            tokens_BL=batch.tokens_BL[:, :end],
            features_BNP=batch.features_BNC,
            branch_scale_D2B=self._stochastic_depth(positions_B),
        )

    def evaluation(self, batch: TrainingBatch) -> ModelInputs:
        """Returns inputs with all labels kept and all branches run."""
        batch = batch.to(self._device)
        return ModelInputs(batch.labels_B, self._quantizer.inputs_from_tokens(batch.tokens_BL), batch.tokens_BL)

    def _drop_labels(self, labels_B: Tensor, positions_B: NDArray[np.int64]) -> Tensor:
        dropped_B = uniforms(self._seed, "class_dropout", positions_B, 1)[:, 0] < self._config.class_dropout
        return labels_B.masked_fill(copied_to(torch.from_numpy(dropped_B), self._device), self._config.num_classes)

    def _stochastic_depth(self, positions_B: NDArray[np.int64]) -> Tensor | None:
        """Returns (D, 2, B) factors, 0 or 1 / keep. The drop rate grows linearly from 0 at the first block (VAR)."""
        if self._config.drop_path_rate == 0:
            return None
        rates_D = np.linspace(0, self._config.drop_path_rate, self._config.depth, dtype=np.float32)
        drawn = uniforms(self._seed, "drop_path", positions_B, 2 * self._config.depth)
        drawn_D2B = drawn.T.reshape(self._config.depth, 2, len(positions_B))
        keep_D11 = 1 - rates_D[:, None, None]
        scales_D2B = ((drawn_D2B < keep_D11) / keep_D11).astype(np.float32)
        return copied_to(torch.from_numpy(scales_D2B), self._device)
