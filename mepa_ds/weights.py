"""State dicts in and out: foreign checkpoints read safely, our own models in Hugging Face's layout.

Nothing here executes a pickle: `.pth` files are read with `weights_only=True`, all else is safetensors (D9).
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mepa_ds.config.base import Section, validate
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, write_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_NESTS = ("state_dict", "model")
# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_MAX_NAMED = 5

ConfigT = TypeVar("ConfigT", bound=Section)


def read_state_dict(source: Path | str | Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Reads a plain state dict, on the CPU.

    Args:
        source: a state dict in memory, a `.safetensors` file, a directory in Hugging Face's layout
            (`model.safetensors`, or shards with their index), or a file of `torch.save`. A checkpoint that holds
            its state dict under "state_dict" or "model" is opened one level deep. Where every name in memory or
            in a file begins with "module." or "_orig_mod.", the wrappers' prefixes, these are taken off.
        prefix: read only the tensors whose names start with it.

    Raises:
        UserError: no such file, not a state dict, or a pickle that holds more than tensors (refused, not executed).
    """
    if isinstance(source, Mapping):
        state = _plain(source, "the state dict")
    else:
        path = Path(source)
        if path.is_dir():
            return _read_directory(path, prefix)
        if path.suffix == ".safetensors":
            return _read_safetensors(path, prefix, unwrap=True)
        state = _read_pickle(path)
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    remedy = "Give what torch.save made of `model.state_dict()`, or safetensors"
    return _plain(read_torch_file(path, remedy), str(path))


def read_torch_file(path: Path, remedy: str) -> Any:
    """What `torch.save` wrote, on the CPU; classes and functions in it are refused, not executed.

    Raises:
        UserError: no such file, a damaged one, or one with more than plain values and tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols that torch.save does not use
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # torch's own text says how to read the file unsafely.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"it holds {refused[1]}" if refused else "it holds something else"
        raise UserError(
            f"{path}: not a plain state dict of tensors ({held}), so it was refused and nothing in it was executed. "
            f"{remedy}"
        ) from error
    except Exception as error:  # damaged bytes raise almost anything: struct.error, IndexError, AssertionError, ...
        raise UserError(f"{path}: damaged, or not a file of torch.save ({type(error).__name__}). {remedy}") from error


def _plain(data: Any, where: str) -> dict[str, Tensor]:
    """The mapping of names to tensors in `data`, or one level below it."""
    if isinstance(data, Mapping):
        for inner in (data, *(data.get(nest) for nest in _NESTS)):
            if isinstance(inner, Mapping) and inner and all(map(_is_named_tensor, inner.items())):
                start = len(_wrapper_of(inner))
                return {name[start:]: tensor for name, tensor in inner.items()}
        found = ", ".join(repr(key) for key in list(data)[:_MAX_NAMED]) or "nothing"
    else:
        found = type(data).__name__
    raise UserError(
        f"{where}: not a plain state dict of tensors (found {found}). "
        f"Give the mapping from parameter names to tensors, alone or under {' or '.join(map(repr, _NESTS))}"
    )


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _wrapper_of(names: Collection[str]) -> str:
    """The prefix of wrappers, one in the other, that all names begin with."""
    for wrapper in _WRAPPERS if names else ():
        if all(name.startswith(wrapper) for name in names):
            return wrapper + _wrapper_of([name.removeprefix(wrapper) for name in names])
    return ""


def _read_safetensors(path: Path, prefix: str, unwrap: bool = False) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            wrapper = _wrapper_of(names) if unwrap else ""
            wanted = [name for name in names if name.startswith(wrapper + prefix)]
            return {name.removeprefix(wrapper): file.get_tensor(name) for name in wanted}
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); copy or write it again") from error


def _read_directory(path: Path, prefix: str) -> dict[str, Tensor]:
    index_path = path / INDEX_NAME
    if not index_path.exists():
        if not (path / WEIGHTS_NAME).exists():
            raise UserError(f"{path}: no {WEIGHTS_NAME} or {INDEX_NAME} in this directory")
        return _read_safetensors(path / WEIGHTS_NAME, prefix)
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index_path}: no 'weight_map' in the index of the shards")
    names = sorted({str(shard) for name, shard in weight_map.items() if name.startswith(prefix)})
    state: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index_path}: a shard must lie beside its index, got {name!r}")
        state.update(_read_safetensors(path / name, prefix))
    if lost := [name for name in weight_map if name.startswith(prefix) and name not in state]:
        raise UserError(f"{index_path}: {_listing(lost)} not in the shard that the index names; copy the shards again")
    return state


def size_in(state: Mapping[str, Tensor], places: Sequence[tuple[str, int, int]], where: str) -> int:
    """The size that most of the places have in common: one damaged tensor is then named, and not all the others.

    Args:
        places: (name, dimensions that the tensor should have, which of them to read), the most reliable first.

    Raises:
        UserError: none of the tensors is there with so many dimensions.
    """
    found = [state[name].shape[dim] for name, ndim, dim in places if name in state and state[name].ndim == ndim]
    if not found:
        name, ndim, _ = places[0]
        given = f"has shape {tuple(state[name].shape)}, expected {ndim} dimensions" if name in state else "is missing"
        raise UserError(f"{where}: the weights do not fit the model; key {name!r} {given}")
    return max(found, key=found.count)


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], where: str, name_in_file: Callable[[str], str] = str
) -> None:
    """Copies `state` into `module`; every name and shape must fit.

    Args:
        name_in_file: what the user's file calls a parameter of ours, for messages.

    Raises:
        UserError: names the missing and unexpected keys with their nearest match, and the layers whose shapes differ.
    """
    expected = module.state_dict()
    missing = [name_in_file(name) for name in expected if name not in state]
    unexpected = [name_in_file(name) for name in state if name not in expected]
    mismatched = [
        f"{name_in_file(name)}: {tuple(state[name].shape)} in the weights, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_listing([with_match(name, unexpected) for name in missing])}")
    if unexpected:
        near = [with_match(name, missing or [name_in_file(known) for known in expected]) for name in unexpected]
        problems.append(f"{len(unexpected)} unexpected: {_listing(near)}")
    if mismatched:
        problems.append(f"{len(mismatched)} of another shape: {_listing(mismatched)}")
    if problems:
        raise UserError(f"{where}: the weights do not fit the model; " + "; ".join(problems))
    module.load_state_dict(dict(state))


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def with_match(name: str, candidates: Sequence[str]) -> str:
    """The name, and the candidate that looks most like it."""
    near = difflib.get_close_matches(name, candidates[:2000], n=1)
    return f"{name} (nearest: {near[0]})" if near else name


def save_pretrained(
    directory: Path | str, config: Section, state: Mapping[str, Tensor], kind: str, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes `config.json` and `model.safetensors` (or shards of at most `max_shard_bytes`, with their index).

    `config.json` is taken away first and comes back last, so a directory that has one is complete.

    Args:
        kind: what the directory holds ("tokenizer", ...), stored as `model_type`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    directory = Path(directory)
    (directory / CONFIG_NAME).unlink(missing_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    for file_name, names in plan.filename_to_tensors.items():
        write_safetensors(directory / file_name, {name: tensors[name] for name in names}, {"format": "pt"})
    for old in directory.glob("model*.safetensors"):
        if _OURS.fullmatch(old.name) and old.name not in plan.filename_to_tensors:
            old.unlink()
    if plan.is_sharded:
        write_json(directory / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    else:
        (directory / INDEX_NAME).unlink(missing_ok=True)
    write_json(directory / CONFIG_NAME, {"model_type": kind, **json.loads(config.model_dump_json())})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Atomically, with the permissions of any other new file (safetensors alone makes it readable to its owner)."""
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:  # the system's error is in its text only
            if (code := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        temporary.chmod(mode)


def read_kind(directory: Path | str) -> str:
    """What `save_pretrained` wrote into this directory: "tokenizer", ..."""
    return str(_read_config(Path(directory)).get("model_type"))


def read_config(directory: Path | str, config_type: type[ConfigT], kind: str) -> ConfigT:
    """The config in a directory of `save_pretrained`.

    Raises:
        UserError: no such directory, it holds something else than `kind`, or its config is not valid.
    """
    directory = Path(directory)
    data = _read_config(directory)
    found = data.pop("model_type", None)
    if found != kind:
        raise UserError(f"{directory}: expected a {kind}, but {CONFIG_NAME} says it holds {found!r}")
    return validate(config_type, data, str(directory / CONFIG_NAME))


def read_pretrained(
    directory: Path | str, config_type: type[ConfigT], kind: str, prefix: str = ""
) -> tuple[ConfigT, dict[str, Tensor]]:
    """The config and the state dict (of names that start with `prefix`) in a directory of `save_pretrained`."""
    directory = Path(directory)
    config = read_config(directory, config_type, kind)
    return config, _read_directory(directory, prefix)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG_NAME).exists():
        raise UserError(
            f"{directory}: no {CONFIG_NAME} here; expected a directory that save_pretrained wrote to the end, such as "
            "`best` or `last` of a run; `mepa export` makes one of a checkpoint"
        )
    return _read_json(directory / CONFIG_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it as JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
