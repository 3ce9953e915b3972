"""Tokenizers on disk: our directories, VAR's files, and directories of VAR's own classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.tokenizer import var_keys
from mepa_ds.weights.directories import read_pretrained
from mepa_ds.weights.state_dict_files import read_checkpoint
from mepa_ds.weights.var_settings import kind_of_vars

KIND = "tokenizer"


class StoredTokenizer(NamedTuple):
    config: TokenizerConfig
    state: dict[str, Tensor]
    name_in_file: Callable[[str], str]
    """Our name of a parameter -> its name in the file, also for one that is missing there."""


def read_tokenizer(
    path: Path | str, scales: Sequence[int] | None, phi_ratio: float | None = None, prefix: str = ""
) -> StoredTokenizer:
    """Reads the tokenizer at a path: a directory of ours, VAR's file, or a directory of VAR's own class.

    Args:
        scales: another schedule for the same weights; None: the one they were trained with.
        phi_ratio: see `var_keys.config_of`.
        prefix: in a directory of ours, read only the tensors whose names start with it.

    Raises:
        UserError: it is none of these, or it cannot have these scales or this ratio.
    """
    if not Path(path).is_dir() or kind_of_vars(Path(path)) is not None:
        return convert_var(path, scales, phi_ratio)
    config, state = read_pretrained(path, TokenizerConfig, KIND, prefix)
    if phi_ratio is not None and phi_ratio != config.phi_ratio:
        raise UserError(f"phi_ratio: {path} was trained with {config.phi_ratio}, and has no other; got {phi_ratio}")
    return StoredTokenizer(config.with_scales(scales, str(path)), state, str)


def convert_var(
    source: Path | str | Mapping[str, Tensor], scales: Sequence[int] | None, phi_ratio: float | None
) -> StoredTokenizer:
    """VAR's state dict -> our config and state dict. Unknown keys stay as they are: strict loading names them."""
    state, notes = read_checkpoint(source, var_keys.WANTED)
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    config = var_keys.config_of(state, notes, scales, phi_ratio, where)
    return StoredTokenizer(config, var_keys.translate(state), var_keys.names_in(state))
