"""How often each code is used at each scale, and how unused codes are moved.

Shape legend: B batch, S scales, V codebook size, L tokens over all scales, D dead codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mepa_ds.scales import ScaleSchedule

# A code counts as used at a scale when its frequency is at least this share of the uniform one (VAR's margin).
USED_SHARE = 0.08


class CodebookUsage(nn.Module):
    """Running frequency of every code at every scale, the same on all ranks.

    Frequencies, not counts, so that neither the batch nor the number of ranks changes what they mean; the mean is
    corrected for its start at zero as Adam's is. One update a step, from hits summed over ranks and micro-batches.
    """

    def __init__(self, schedule: ScaleSchedule, codebook_size: int, decay: float):
        super().__init__()
        self.schedule, self.codebook_size, self.decay = schedule, codebook_size, decay
        self.register_buffer("mean_SV", torch.zeros(schedule.num_scales, codebook_size))
        self.register_buffer("num_updates_S", torch.zeros(schedule.num_scales, dtype=torch.int64))
        self.mean_SV: Tensor
        self.num_updates_S: Tensor

    def hits_of(self, tokens_BL: Tensor, num_scales_B: Tensor | None = None) -> Tensor:
        """(S, V) fp32 counts of a batch; tokens of scales that a sample leaves out do not count."""
        scale_L = self.schedule.scale_index_L(tokens_BL.device)
        bins_BL = scale_L * self.codebook_size + tokens_BL
        if num_scales_B is not None:
            bins_BL = bins_BL[scale_L < num_scales_B[:, None]]
        counts = torch.bincount(bins_BL.flatten(), minlength=self.mean_SV.numel())
        return counts.view_as(self.mean_SV).float()

    def update(self, hits_SV: Tensor) -> None:
        """One step of the running mean. A scale without hits keeps its mean."""
        totals_S1 = hits_SV.sum(1, keepdim=True)
        seen_S1 = totals_S1 > 0
        frequency_SV = hits_SV / totals_S1.clamp(min=1)
        self.mean_SV.copy_(torch.where(seen_S1, self.mean_SV.lerp(frequency_SV, 1 - self.decay), self.mean_SV))
        self.num_updates_S += seen_S1.view(-1)

    @property
    def frequency_SV(self) -> Tensor:
        """(S, V): each row sums to 1 once its scale was seen (to a little more after `forget`), and is zero before."""
        correction_S = 1 - torch.tensor(self.decay, dtype=torch.float64) ** self.num_updates_S.double().cpu()
        return self.mean_SV / correction_S.clamp(min=1e-12).to(self.mean_SV)[:, None]

    @property
    def frequency_V(self) -> Tensor:
        """(V,): over all scales, weighted by their tokens."""
        lengths_S = torch.tensor(self.schedule.lengths).to(self.mean_SV)
        return (lengths_S / lengths_S.sum()) @ self.frequency_SV

    def shares(self) -> tuple[list[float], float]:
        """Share of codes in use, in [0, 1]: at each scale, and over all scales."""
        margin = USED_SHARE / self.codebook_size
        by_scale = (self.frequency_SV >= margin).float().mean(1).tolist()
        return by_scale, float((self.frequency_V >= margin).float().mean())

    def dead_codes(self, below: float) -> Tensor:
        """(D,) int64: codes whose frequency is below `below` times the uniform one at every scale.

        The scales are not added up: coarse scales have few tokens, and codes that only they use would seem unused.
        """
        return (self.frequency_SV < below / self.codebook_size).all(0).nonzero().flatten()

    def forget(self, moved_D: Tensor) -> None:
        """Gives moved codes the uniform frequency, so that they have time to find tokens before the next check.

        When all codes have moved, no count is valid any more, and the means start anew.
        """
        if len(moved_D) == self.codebook_size:
            self.mean_SV.zero_()
            self.num_updates_S.zero_()
        else:
            self.mean_SV[:, moved_D] = self.mean_SV.sum(1, keepdim=True) / self.codebook_size


@torch.no_grad()
def move_codes(codebook: nn.Embedding, optimizer: torch.optim.Optimizer, dead_D: Tensor, values_DC: Tensor) -> None:
    """Puts dead codes at new places and clears what the optimizer remembers of the old ones."""
    codebook.weight[dead_D] = values_DC.to(codebook.weight)
    for value in optimizer.state.get(codebook.weight, {}).values():
        if isinstance(value, Tensor) and value.shape == codebook.weight.shape:
            value[dead_D] = 0


def perplexity(frequency_V: Tensor) -> float:
    """exp of the entropy of the codes: the number of codes that are used as if evenly."""
    return float(torch.special.entr(frequency_V / frequency_V.sum().clamp(min=1e-12)).sum().exp())
