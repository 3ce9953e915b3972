"""What the tests need of a processor: the product's own predicate decides whether one is skipped."""

from __future__ import annotations

import pytest
import torch

from mepa_ds.precision import is_supported

needs_fp16 = pytest.mark.skipif(not is_supported("fp16", torch.device("cpu")), reason="this CPU has no fp16")
