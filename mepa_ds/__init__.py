"""mepa_ds: pretraining of visual autoregressive mixture-of-experts models.

The public names below are imported on first use: `import mepa_ds` is instant and needs neither a process group nor
DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mepa_ds import moved

if TYPE_CHECKING:
    from mepa_ds.errors import UserError as UserError
    from mepa_ds.generation.model_files import load_pretrained as load_pretrained
    from mepa_ds.generation.model_files import save_pretrained as save_pretrained
    from mepa_ds.generation.sampling import sample as sample
    from mepa_ds.models.transformer import NextScaleTransformer as NextScaleTransformer
    from mepa_ds.scales import ScaleSchedule as ScaleSchedule
    from mepa_ds.tokenizer.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"
_PUBLIC = {
    "NextScaleTransformer": "mepa_ds.models.transformer",
    "ScaleSchedule": "mepa_ds.scales",
    "Tokenizer": "mepa_ds.tokenizer.tokenizer",
    "UserError": "mepa_ds.errors",
    "load_pretrained": "mepa_ds.generation.model_files",
    "sample": "mepa_ds.generation.sampling",
    "save_pretrained": "mepa_ds.generation.model_files",
}
__all__ = list(_PUBLIC)
moved.install()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mepa_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
