"""The only package that imports DeepSpeed."""

import os

from mepa_ds import distributed

distributed.hide_unused_gpus(distributed.read_launch())
if not distributed.uses_gpu():
    # Otherwise DeepSpeed probes for accelerators and warns on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
