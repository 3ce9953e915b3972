"""Files with state dicts, foreign ones too, read safely.

Nothing here executes a pickle: `.pth` files are read with `weights_only=True`, all else is safetensors. What a file
says of its sizes is held against its own size before memory is taken (mepa_ds.weights.file_checks).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.files import check_regular
from mepa_ds.safety.reading import read_json_object
from mepa_ds.weights.file_checks import check_safetensors, check_tensors, check_torch_file
from mepa_ds.weights.state_dicts import MAX_NAMED, Found, Wanted, averages_not_read, find, listed, nests_of, notes_in

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"  # of older versions of huggingface_hub
_HUB_NAMES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")


def read_state_dict(
    source: Path | str | Mapping[str, Tensor], prefix: str = "", wanted: Wanted | None = None
) -> dict[str, Tensor]:
    """Reads a state dict, on the CPU.

    Args:
        source: a state dict in memory, a `.safetensors` file, a directory in Hugging Face's layout
            (`model.safetensors`, or shards with their index), or a file of `torch.save`, in which the state dict may
            be nested beside others, optimizer states and settings. Parts of names that wrappers (DDP, FSDP,
            torch.compile) add are taken out.
        prefix: read only the tensors whose names start with it.
        wanted: which of several state dicts is meant; None: the outermost one.

    Raises:
        UserError: no such file, no state dict in it, several that are meant, or a pickle that holds more than tensors
            and plain values (refused, not executed).
    """
    return _read(source, prefix, wanted).state


def read_checkpoint(
    source: Path | str | Mapping[str, Tensor], wanted: Wanted, prefix: str = ""
) -> tuple[dict[str, Tensor], list[Mapping[str, Any]]]:
    """A state dict and the settings beside it, nearest first: a training program's `args` or `config` in the file,
    or the config.json beside weights in Hugging Face's layout.
    """
    state, notes, _ = _read(source, prefix, wanted)
    folder = None if isinstance(source, Mapping) else settings_folder(Path(source))
    if folder is not None and (folder / CONFIG_NAME).exists():
        notes = [*notes, read_json(folder / CONFIG_NAME)]
    return state, notes


def read_with_rest(path: Path, wanted: Wanted) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A state dict, and the names in the file of the tensors around it, which are no part of the wanted network."""
    state, _, rest = _read(path, "", wanted)
    return state, rest


def settings_folder(path: Path) -> Path | None:
    """Where the config.json of weights in Hugging Face's layout would stand; None for a file of another name."""
    if path.is_dir():
        return path
    return path.parent if _HUB_NAMES.fullmatch(path.name) else None


class _Read(NamedTuple):
    state: dict[str, Tensor]
    notes: list[Mapping[str, Any]]
    rest: tuple[str, ...]
    """Names in the file of tensors beside the state dict, which have not its prefix."""


def _read(source: Path | str | Mapping[str, Tensor], prefix: str, wanted: Wanted | None) -> _Read:
    if isinstance(source, Mapping):
        return _chosen(source, prefix, wanted, "the state dict", None)
    path = Path(source)
    if path.suffix != ".safetensors" and not path.is_dir():
        return _chosen(_read_pickle(path), prefix, wanted, str(path), path)
    if path.is_dir() and not (path / WEIGHTS_NAME).exists() and not (path / INDEX_NAME).exists():
        if (path / PICKLE_NAME).exists():
            return _chosen(_read_pickle(path / PICKLE_NAME), prefix, wanted, str(path), path / PICKLE_NAME)
        raise UserError(f"{path}: no {WEIGHTS_NAME} or {INDEX_NAME} in this directory{_snapshots(path)}")
    shards = _shards_in(path)
    if not shards:
        return _Read({}, [], ())
    # The command in a refusal needs a file: for a directory it is the weights file of the layout.
    file = path if not path.is_dir() else path / WEIGHTS_NAME
    found = find({(): {name: name for name in shards}}, wanted, str(path), file)
    if found.prefix:
        _say_taken(str(path), found)
    names = {name: raw for name, raw in found.entries.items() if name.startswith(prefix)}
    return _Read(_load_from(shards, names), [], _rest(shards, found))


def _chosen(tree: Any, prefix: str, wanted: Wanted | None, where: str, file: Path | None) -> _Read:
    nests = nests_of(tree)
    if not nests:
        held = (
            ", ".join(repr(key)[:100] for key in list(tree)[:MAX_NAMED]) or "nothing"
            if isinstance(tree, Mapping)
            else None
        )
        raise UserError(
            f"{where}: not a plain state dict of tensors (found {held or type(tree).__name__}). "
            "Give a mapping from parameter names to tensors, alone or nested in others"
        )
    found = find(nests, wanted, where, file)
    averages = averages_not_read(tree, found, wanted)
    for key in averages:
        distributed.note_once(
            f"{where}: took {found.label}; the averaged weights under {key!r} are in a form that is not read"
        )
    if (found.place or found.prefix) and not averages:
        _say_taken(where, found)
    state = {name: tensor for name, tensor in found.entries.items() if name.startswith(prefix)}
    return _Read(state, notes_in(tree, found.place), _rest(nests[found.place], found))


def _snapshots(path: Path) -> str:
    """What to give instead of a model's folder in the Hub's cache."""
    inside = sorted(path.glob("snapshots/*/"))
    return f"; give the snapshot in it that you mean, such as {inside[-1]}" if inside else ""


def _rest(entries: Mapping[str, Any], found: Found[Any]) -> tuple[str, ...]:
    inside = set(found.names_in_file)
    return tuple(name for name in entries if name not in inside)


def _say_taken(where: str, found: Found[Any]) -> None:
    """Which of a file's state dicts it was."""
    distributed.note_once(f"{where}: took the weights under {found.label}")


def _read_pickle(path: Path) -> Any:
    return read_torch_file(
        path,
        "Load it in the program that wrote it, save the weights alone as torch.save(model.state_dict(), PATH) does, or "
        "as safetensors, and give that file",
    )


def read_torch_file(path: Path, remedy: str) -> Any:
    """Reads what `torch.save` wrote, on the CPU; classes and functions in it are refused, not executed.

    Raises:
        UserError: no such file, a damaged one, one with more than plain values and tensors, or one whose tensors would
            be larger than the file.
    """
    try:
        check_torch_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols that torch.save does not use
            tree = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(tree, path)
        return tree
    except UserError as error:
        raise UserError(f"{path}: damaged, or not a file of torch.save: {error}. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # torch's own text says how to read the file unsafely.
        refused = re.search(r"GLOBAL ([\w.]{1,200})", str(error))
        held = f"it holds {refused[1]}" if refused else "it holds something else"
        raise UserError(
            f"{path}: not a plain state dict of tensors ({held}), so it was refused and nothing in it was executed. "
            f"{remedy}"
        ) from error
    except Exception as error:  # damaged bytes raise almost anything: struct.error, IndexError, AssertionError, ...
        raise UserError(f"{path}: damaged, or not a file of torch.save ({type(error).__name__}). {remedy}") from error


def _shards_in(path: Path) -> dict[str, Path]:
    """Name of each tensor in a `.safetensors` file, or in a directory's -> the file it is in."""
    if path.is_file() or not path.is_dir():
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    index_path = path / INDEX_NAME
    if not index_path.exists():
        return _shards_in(path / WEIGHTS_NAME)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index_path}: no 'weight_map' in the index of the shards")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise UserError(
                f"{index_path}: a shard must lie beside its index, under a plain name such as "
                f"model-00001-of-00002.safetensors; got {str(shard)[:100]!r}"
            )
    return {name: path / shard for name, shard in weight_map.items()}


def _load_from(shards: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of these names (ours -> the file's), each shard opened once."""
    state: dict[str, Tensor] = {}
    for shard in dict.fromkeys(shards[raw] for raw in names.values()):
        with _opened(shard) as file:
            inside = set(file.keys())
            mine = {name: raw for name, raw in names.items() if shards[raw] == shard}
            if lost := [raw for raw in mine.values() if raw not in inside]:
                raise UserError(
                    f"{shard.with_name(INDEX_NAME)}: {listed(lost)} not in the shard that the index names; copy the "
                    "shards again"
                )
            state.update({name: file.get_tensor(raw) for name, raw in mine.items()})
    return {name: state[name] for name in names}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_regular(path)
        check_safetensors(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); copy or write it again") from error
    except (RuntimeError, TypeError, OverflowError, AttributeError, KeyError, MemoryError) as error:
        # PyTorch, of shapes and types that it does not have
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: it has a tensor that cannot be read ({said}); write it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for what is no JSON object."""
    try:
        return read_json_object(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot read it as JSON: {error}; copy or write it again") from error
