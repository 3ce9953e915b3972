"""Teachers as tiny as the models that `transformers_fixtures` has numbers of."""

from __future__ import annotations

from pathlib import Path

import timm

from mepa_ds.teachers.timm_vit import TimmVit, load_weights
from tests.teachers.transformers_fixtures import TINY, TINY_SIZES


def tiny(name: str, path: Path, model_name: str | None = None) -> TimmVit:
    """The teacher as tiny as the model of that name, with the weights at `path`."""
    known, settings = TINY[name]
    model = timm.create_model(model_name or known, num_classes=0, dynamic_img_size=True, **TINY_SIZES, **settings)
    load_weights(model, name, model_name or known, path)
    return TimmVit(name, model, 4).freeze()
