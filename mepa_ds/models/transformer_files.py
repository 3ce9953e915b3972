"""Transformers on disk: directories of ours, VAR's files, and directories that VAR's own classes wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.var_checkpoint import convert_var, name_in_var
from mepa_ds.weights.directories import check_strict, read_class_names, read_pretrained
from mepa_ds.weights.file_checks import check_fits
from mepa_ds.weights.var_settings import kind_of_vars
from mepa_ds.weights.var_sizes import GivenSizes

ModelT = TypeVar("ModelT", bound=nn.Module)

KIND = "next_scale_transformer"
"""The kind that config.json states for a directory with a transformer."""


class StoredTransformer(NamedTuple):
    """The content of a file or directory, under our names."""

    config: ModelConfig
    state: dict[str, Tensor]
    name_in_file: Callable[[str], str]
    """Maps our name of a parameter to its name in the file, for messages."""
    class_names: tuple[str, ...] = ()
    """By label; empty where the file does not tell."""


def read_transformer(path: Path, given: GivenSizes) -> StoredTransformer:
    """Reads a directory of ours, or VAR's weights. `convert_var` says what `given` is for.

    Raises UserError if the path holds no transformer, or if its sizes are neither in the weights nor given.
    """
    if path.is_dir() and kind_of_vars(path) is None:
        return StoredTransformer(*read_pretrained(path, ModelConfig, KIND), str, read_class_names(path))
    return StoredTransformer(*convert_var(path, given), name_in_var)


def with_weights(
    make: Callable[[], ModelT], state: Mapping[str, Tensor], where: str, name_in_file: Callable[[str], str] = str
) -> ModelT:
    """Makes a model on the meta device, materialises it on the CPU with the weights of `state`, in evaluation mode.

    No initial weights are drawn. Raises UserError, with the names that the file has, for weights that do not fit.
    """
    model = fitting(make, state, where, name_in_file).to_empty(device="cpu")
    model.load_state_dict(dict(state))
    return model.eval()


def fitting(
    make: Callable[[], ModelT], state: Mapping[str, Tensor], where: str, name_in_file: Callable[[str], str] = str
) -> ModelT:
    """Makes a model on the meta device. Raises UserError where the weights of `state` are not such a model's."""
    check_fits(make, state, where)
    with torch.device("meta"):
        model = make()
    check_strict(model, state, where, name_in_file)
    return model
