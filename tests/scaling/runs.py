"""Tables as `mepa scale collect` writes them, of runs whose losses follow a law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

SIDES = (1, 2, 3)


def row(n: float, d: float, **changes: Any) -> dict[str, Any]:
    """One run of n weights and d tokens. Its loss is that of E 2, A 100, B 300, alpha 0.3, beta 0.35."""
    loss = 2 + 100 * n**-0.3 + 300 * d**-0.35
    samples = d / 14
    values = {
        "run": f"n{n:.3g}-d{d:.3g}-s{changes.get('seed', 0)}", "role": "fit", "status": "finished", "seed": 0,
        "kind": "dense", "depth": 4, "width": 64, "experts": 0, "granularity": np.nan, "params_matrix": n,
        "params_active": 1.5 * n, "params_total": 2 * n**1.02, "samples": samples, "tokens": d,
        "unique_images": samples, "batch": 10, "steps": samples / 10, "weights_step": samples / 10, "lr_peak": 1e-3,
        "flops_model": 7 * n**1.05 * d, "loss": loss, "loss_last": loss, "tokenizer_hash": "tok",
        "heldout_hash": "held", "scales": "1,2,3",
    }  # fmt: skip
    values |= {f"loss_scale_{k}": loss * (0.9 + 0.05 * k) for k in (1, 2, 3)}
    return values | changes


def study(noise: float = 0.0, seeds: int = 1) -> pd.DataFrame:
    """4 sizes at 4 lengths, `seeds` of each, and one larger run held out."""
    rng = np.random.default_rng(0)
    rows = [
        row(n, d, seed=seed)
        for n in np.geomspace(1e6, 3e7, 4)
        for d in np.geomspace(1.4e7, 1.4e9, 4)
        for seed in range(seeds)
    ]
    rows.append(row(1e8, 1.4e9, role="hold_out"))
    table = pd.DataFrame(rows)
    table["loss"] *= np.exp(noise * rng.normal(size=len(table)))
    return table
