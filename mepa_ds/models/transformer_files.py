"""Transformers on disk: our directories, VAR's files, and directories of VAR's own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.var_checkpoint import Given, convert_var, name_in_var
from mepa_ds.weights.directories import read_pretrained
from mepa_ds.weights.var_settings import kind_of_vars

KIND = "next_scale_transformer"
"""What config.json calls what a directory holds."""


class StoredTransformer(NamedTuple):
    config: ModelConfig
    state: dict[str, Tensor]
    name_in_file: Callable[[str], str]
    """What the file calls a parameter of ours."""


def read_transformer(path: Path, given: Given) -> StoredTransformer:
    """Whichever lies there. See `convert_var` for what `given` serves.

    Raises UserError for what is no transformer, or does not tell what was not given either.
    """
    if path.is_dir() and kind_of_vars(path) is None:
        return StoredTransformer(*read_pretrained(path, ModelConfig, KIND), str)
    return StoredTransformer(*convert_var(path, given), name_in_var)
