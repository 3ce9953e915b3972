"""Codebook usage against naive counts, and the revival of dead codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mepa_ds.scales import ScaleSchedule
from mepa_ds.tokenizer.usage import CodebookUsage, move_codes, perplexity

SCHEDULE = ScaleSchedule.of((1, 2, 3))
V = 5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), num_batches=st.integers(1, 4), dropout=st.booleans())
def test_frequencies_equal_a_naive_running_mean(seed: int, num_batches: int, dropout: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    usage, decay = CodebookUsage(SCHEDULE, V, 0.7), 0.7
    means = [[0.0] * V for _ in SCHEDULE.sides]
    weights = [0.0] * SCHEDULE.num_scales
    for _ in range(num_batches):
        tokens_BL = torch.randint(V, (3, SCHEDULE.num_tokens), generator=generator)
        num_scales_B = torch.randint(1, 4, (3,), generator=generator) if dropout else None
        usage.update(usage.hits_of(tokens_BL, num_scales_B))
        for k, (start, end) in enumerate(SCHEDULE.bounds):
            rows = [b for b in range(3) if num_scales_B is None or num_scales_B[b] > k]
            seen = tokens_BL[rows, start:end].flatten().tolist()
            if not seen:
                continue
            weights[k] = decay * weights[k] + 1 - decay
            means[k] = [decay * mean + (1 - decay) * seen.count(v) / len(seen) for v, mean in enumerate(means[k])]
    expected = [[mean / weight if weight else 0.0 for mean in row] for row, weight in zip(means, weights, strict=True)]
    torch.testing.assert_close(usage.frequency_SV, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    by_scale, _ = usage.shares()
    naive = [sum(frequency >= 0.08 / V for frequency in row) / V for row in expected]
    assert by_scale == pytest.approx(naive)


def test_overall_frequency_weighs_scales_by_their_tokens() -> None:
    usage = CodebookUsage(SCHEDULE, V, 0.9)
    tokens_BL = torch.randint(V, (4, SCHEDULE.num_tokens))
    usage.update(usage.hits_of(tokens_BL))
    expected = torch.bincount(tokens_BL.flatten(), minlength=V).float() / tokens_BL.numel()
    torch.testing.assert_close(usage.frequency_V, expected)
    assert perplexity(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(2.0)


def test_dead_codes_are_found_moved_and_given_time() -> None:
    usage, codebook = CodebookUsage(SCHEDULE, V, 0.9), nn.Embedding(V, 2)
    optimizer = torch.optim.AdamW(codebook.parameters(), lr=0.1)
    codebook.weight.sum().backward()
    optimizer.step()
    tokens_BL = torch.randint(3, (4, SCHEDULE.num_tokens))  # codes 3 and 4 never occur
    usage.update(usage.hits_of(tokens_BL))
    dead_D = usage.dead_codes(0.01)
    assert dead_D.tolist() == [3, 4]
    kept = codebook.weight[:3].detach().clone()
    values_DC = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    move_codes(codebook, optimizer, dead_D, values_DC)
    usage.forget(dead_D)
    assert torch.equal(codebook.weight[3:], values_DC)
    assert torch.equal(codebook.weight[:3], kept)
    state = optimizer.state[codebook.weight]
    assert not state["exp_avg"][3:].any()
    assert not state["exp_avg_sq"][3:].any()
    assert state["exp_avg"][:3].all()
    assert usage.dead_codes(0.01).tolist() == []
    for _ in range(60):  # still unused: dead again in time
        usage.update(usage.hits_of(tokens_BL))
    assert usage.dead_codes(0.01).tolist() == [3, 4]


def test_a_code_in_use_at_one_coarse_scale_is_not_dead() -> None:
    """One token of fourteen: over all scales together its frequency would be below the margin."""
    usage = CodebookUsage(SCHEDULE, V, 0.9)
    tokens_BL = torch.randint(3, (100, SCHEDULE.num_tokens))
    tokens_BL[:10, 0] = 3  # a tenth of the images at the first scale, half of what would be even
    usage.update(usage.hits_of(tokens_BL))
    assert usage.frequency_V[3] < 0.4 / V
    assert usage.dead_codes(0.4).tolist() == [4]


def test_counting_starts_anew_when_every_code_moved() -> None:
    usage = CodebookUsage(SCHEDULE, V, 0.9)
    usage.update(usage.hits_of(torch.zeros(2, SCHEDULE.num_tokens, dtype=torch.int64)))
    usage.forget(torch.arange(V))
    tokens_BL = torch.ones(2, SCHEDULE.num_tokens, dtype=torch.int64)
    usage.update(usage.hits_of(tokens_BL))
    torch.testing.assert_close(usage.frequency_V, torch.eye(V)[1])
