"""Ranks are forked from a server that has imported everything: 6 s of imports once, not once a rank."""

from __future__ import annotations

import multiprocessing
import os

os.environ["OMP_NUM_THREADS"] = "1"  # the server and all ranks inherit it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CONTEXT = multiprocessing.get_context("forkserver")
_LATE_IMPORTS = ["mepa_ds.checkpoint.store"]
_OURS = [
    "mepa_ds.pretrain.run",
    "mepa_ds.cli.pretrain",
    "mepa_ds.cli.train_tokenizer",
    "tests.ranks",
    "tests.engine.ranks",
]
CONTEXT.set_forkserver_preload([*_OURS, *_LATE_IMPORTS])
