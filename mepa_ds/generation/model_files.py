"""Models to and from directories: safetensors + config.json, Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.models import transformer_files
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer import tokenizer_files
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import read_kind
from mepa_ds.weights.var_settings import kind_of_vars


def save_pretrained(model: NextScaleTransformer | Tokenizer, directory: Path | str) -> None:
    """Writes `model.safetensors` (sharded above 5 GB) and `config.json`."""
    model.save_pretrained(directory)


def load_pretrained(directory: Path | str) -> NextScaleTransformer | Tokenizer:
    """Loads the model or tokenizer in a directory, ours or one of VAR's classes. Raises UserError for anything else."""
    if (of_vars := kind_of_vars(Path(directory))) is not None:
        return NextScaleTransformer.open(directory) if of_vars == "transformer" else Tokenizer.open(directory)
    kind = read_kind(directory)
    if kind == transformer_files.KIND:
        return NextScaleTransformer.load(directory)
    if kind == tokenizer_files.KIND:
        return Tokenizer.load(directory)
    raise UserError(f"{directory}: holds {kind!r}; expected {transformer_files.KIND!r} or {tokenizer_files.KIND!r}")
