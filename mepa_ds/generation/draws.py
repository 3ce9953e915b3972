"""From logits to codes: what top-k and top-p leave, and a draw of it.

Shapes: B images, l tokens of the current scale, V codebook, Z code width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.generation.by_scale import ByScale
from mepa_ds.machine import copied_to
from mepa_ds.random_streams import uniforms


def keep_top(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets all but the top-k, then all but the top-p codes to -inf (VAR's order and comparisons)."""
    V = logits_BlV.shape[-1]
    if 0 < top_k < V:
        smallest = logits_BlV.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits_BlV = logits_BlV.masked_fill(logits_BlV < smallest, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits_BlV.sort(dim=-1)
        remove = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[..., -1:] = False
        logits_BlV = logits_BlV.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    return logits_BlV


class Draw:
    """Turns the logits of a scale into codes; `generator` only with rng="var"."""

    def __init__(self, seed: int, index_B: np.ndarray, generator: torch.Generator | None, by_scale: ByScale):
        self.seed, self.index_B, self.generator, self.by_scale = seed, index_B, generator, by_scale

    def __call__(self, logits_BlV: Tensor, scale: int, codebook_VZ: Tensor) -> Tensor:
        """(B, l, Z) codes. The logits have been divided by the temperature."""
        raise NotImplementedError

    def kept(self, logits_BlV: Tensor, scale: int) -> Tensor:
        """`keep_top` with this scale's limits."""
        return keep_top(logits_BlV, self.by_scale.top_k_S[scale], self.by_scale.top_p_S[scale])

    def var_tokens(self, kept_BlV: Tensor) -> Tensor:
        drawn = torch.multinomial(kept_BlV.softmax(-1).flatten(0, 1), 1, generator=self.generator)
        return drawn.view(kept_BlV.shape[:2])


class CodeDraw(Draw):
    """Draws one code for each position."""

    def __call__(self, logits_BlV: Tensor, scale: int, codebook_VZ: Tensor) -> Tensor:
        if self.generator is not None:
            return codebook_VZ[self.var_tokens(self.kept(logits_BlV, scale))]
        drawn_Bl = uniforms(self.seed, f"sample/{scale}", self.index_B, logits_BlV.shape[1])
        uniform_Bl = copied_to(torch.from_numpy(drawn_Bl), logits_BlV.device)
        chosen_Bl = draw_top(logits_BlV, self.by_scale.top_k_S[scale], self.by_scale.top_p_S[scale], uniform_Bl)
        return codebook_VZ[chosen_Bl]


def draw_top(logits_BlV: Tensor, top_k: int, top_p: float, uniform_Bl: Tensor) -> Tensor:
    """(B, l) codes: inverse of the cumulative distribution over `keep_top`'s codes at one uniform number a position.

    Works on the k largest logits in descending order: no sort of the whole codebook, and rounding of the sums can
    never make an excluded code come out.
    """
    V = logits_BlV.shape[-1]
    logits_Blk, codes_Blk = logits_BlV.topk(min(top_k, V) if top_k > 0 else V, dim=-1)
    mass_Blk = logits_Blk.softmax(-1).cumsum(-1)
    count_Bl1 = torch.full_like(codes_Blk[..., :1], codes_Blk.shape[-1])
    if 0 < top_p < 1:
        # A code stays while the mass before it is below p.
        count_Bl1 = (mass_Blk < top_p).sum(-1, keepdim=True).add_(1).clamp_(max=codes_Blk.shape[-1])
    target_Bl1 = uniform_Bl[..., None] * mass_Blk.gather(-1, count_Bl1 - 1)
    place_Bl1 = torch.minimum(torch.searchsorted(mass_Blk, target_Bl1, right=True), count_Bl1 - 1)
    return codes_Blk.gather(-1, place_Bl1)[..., 0]


class SmoothDraw(Draw):
    """Mixes the kept codes by Gumbel-softmax weights, colder at finer scales."""

    def __call__(self, logits_BlV: Tensor, scale: int, codebook_VZ: Tensor) -> Tensor:
        ratio = self.by_scale.ratio(scale)
        temperature = max(0.27 * (1 - ratio * 0.95), 0.005)
        kept_BlV = self.kept(logits_BlV, scale)
        if self.generator is not None:
            self.var_tokens(kept_BlV)  # VAR draws them, and then mixes: its generator has moved on
            noise = torch.empty_like(kept_BlV).exponential_(generator=self.generator)
        else:
            count = kept_BlV.shape[1] * kept_BlV.shape[2]
            drawn = uniforms(self.seed, f"smooth/{scale}", self.index_B, count)
            noise = -copied_to(torch.from_numpy(drawn), kept_BlV.device).view_as(kept_BlV).neg().log1p()
        gumbels = -noise.clamp_min(1e-30).log()
        weights = F.softmax((kept_BlV * (1 + ratio) + gumbels) / temperature, dim=-1)
        return weights @ codebook_VZ.float()
