"""The only package that imports DeepSpeed."""

import os

import torch

if not torch.cuda.is_available():
    # Otherwise DeepSpeed probes for accelerators and warns on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
