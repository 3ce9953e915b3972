"""State dicts into modules, and our own models in Hugging Face's layout."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mepa_ds.config.base import Section, validate
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, write_json
from mepa_ds.safety.reading import read_json_object
from mepa_ds.weights.kinds import but_another
from mepa_ds.weights.state_dict_files import CONFIG_NAME, INDEX_NAME, read_json, read_state_dict
from mepa_ds.weights.state_dicts import MAX_NAMED, listed

ID_TO_LABEL, LABEL_TO_ID = "id2label", "label2id"
_MOST_CLASSES = 10**6
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

ConfigT = TypeVar("ConfigT", bound=Section)


def size_in(state: Mapping[str, Tensor], places: Sequence[tuple[str, int, int]], where: str) -> int:
    """The size that most of the places agree on. If one tensor is damaged, that one is then named, and not all others.

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
    """Copies `state` into `module`; every name and shape must fit. See `check_strict`."""
    check_strict(module, state, where, name_in_file)
    module.load_state_dict(dict(state))


def check_strict(
    module: nn.Module, state: Mapping[str, Tensor], where: str, name_in_file: Callable[[str], str] = str
) -> None:
    """Holds `state` against a module, which may be on "meta".

    Args:
        name_in_file: our name of a parameter -> its name in the user's file, for messages.

    Raises:
        UserError: names the missing and unexpected keys with their nearest match, and the layers whose shapes differ,
            or that hold whole or complex numbers where weights are: copied, they would become others without a word.
    """
    expected = module.state_dict()
    missing = [name_in_file(name) for name in expected if name not in state]
    unexpected = [name_in_file(name) for name in state if name not in expected]
    mismatched = [
        f"{name_in_file(name)}: {tuple(state[name].shape)} in the weights, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    mistyped = [
        f"{name_in_file(name)}: {str(state[name].dtype).removeprefix('torch.')}"
        for name, tensor in expected.items()
        if name in state and tensor.is_floating_point() and not state[name].is_floating_point()
    ]
    problems = []
    if missing:
        near = [with_match(name, unexpected) for name in missing[:MAX_NAMED]]
        problems.append(f"{len(missing)} missing: {listed([*near, *missing[MAX_NAMED:]])}")
    if unexpected:
        known = missing or [name_in_file(name) for name in expected]
        near = [with_match(name, known) for name in unexpected[:MAX_NAMED]]
        problems.append(f"{len(unexpected)} unexpected: {listed([*near, *unexpected[MAX_NAMED:]])}")
    if mismatched:
        problems.append(f"{len(mismatched)} of another shape: {listed(mismatched)}")
    if mistyped:
        problems.append(f"{len(mistyped)} that are not of floating-point numbers: {listed(mistyped)}")
    if problems:
        another = but_another(unexpected) if len(missing) > len(expected) / 2 else ""
        raise UserError(f"{where}: the weights do not fit the model; " + "; ".join(problems) + another)


def with_match(name: str, candidates: Sequence[str]) -> str:
    """The name, and the candidate that looks most like it."""
    near = difflib.get_close_matches(name, candidates[:2000], n=1)
    return f"{name} (nearest: {near[0]})" if near else name


def save_pretrained(
    directory: Path | str,
    config: Section,
    state: Mapping[str, Tensor],
    kind: str,
    max_shard_bytes: int = 5 * 10**9,
    class_names: Sequence[str] = (),
) -> None:
    """Writes `config.json` and `model.safetensors` (or shards of at most `max_shard_bytes`, with their index).

    `config.json` is taken away first and comes back last, so a directory that has one is complete.

    Args:
        kind: what the directory holds ("tokenizer", ...), stored as `model_type`.
        class_names: names of the classes by label, stored as Hugging Face's `id2label` and `label2id`; `label2id` has
            no name that several classes share.

    Raises:
        UserError: another kind of model is there, whose files would be lost.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    directory = Path(directory)
    check_no_other_model(directory, kind)
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
    stored = {"model_type": kind, **json.loads(config.model_dump_json()), **_named(class_names)}
    write_json(directory / CONFIG_NAME, stored)


def check_no_other_model(directory: Path, kind: str) -> None:
    """Raises UserError where the directory holds another kind of model: files of the same names would be replaced."""
    path = directory / CONFIG_NAME
    try:
        found = read_json_object(path).get("model_type")
    except (OSError, ValueError):  # none, or a torn one
        return
    if found != kind:
        held = "a model" if found is None else f"a model of type {found!r}"
        raise UserError(f"{directory}: holds {held}, which a {kind} would replace; choose another directory")


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


def _named(class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    if not any(class_names):
        return {}
    counts = Counter(class_names)
    return {
        ID_TO_LABEL: {str(label): name for label, name in enumerate(class_names)},
        LABEL_TO_ID: {name: label for label, name in enumerate(class_names) if name and counts[name] == 1},
    }


def read_class_names(directory: Path | str) -> tuple[str, ...]:
    """The names of the classes by label that a directory's config.json has as `id2label`; empty if there are none.

    A class without a name has an empty one.

    Raises:
        UserError: `id2label` is no mapping of numbers from 0 on to names.
    """
    path = Path(directory) / CONFIG_NAME
    names = read_json(path).get(ID_TO_LABEL) if path.is_file() else None
    if not names:
        return ()
    try:
        by_label = {int(label): str(name) for label, name in names.items()}
        if min(by_label) < 0 or max(by_label) > _MOST_CLASSES:
            raise ValueError(f"a class {min(by_label) if min(by_label) < 0 else max(by_label)}")
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: {ID_TO_LABEL}: expected names by class, such as {{'0': 'Shirt', '1': 'Dress'}} ({error}); "
            "mend it, or take it out"
        ) from error
    return tuple(by_label.get(label, "") for label in range(max(by_label) + 1))


def read_kind(directory: Path | str) -> str:
    """The `kind` that `save_pretrained` stored in this directory: "tokenizer", ..."""
    return str(_read_config(Path(directory)).get("model_type"))


def read_config(directory: Path | str, config_type: type[ConfigT], kind: str) -> ConfigT:
    """The config in a directory of `save_pretrained`.

    Raises:
        UserError: no such directory, it holds something else than `kind`, or its config is not valid.
    """
    directory = Path(directory)
    data = _read_config(directory)
    found = data.pop("model_type", None)
    for name in (ID_TO_LABEL, LABEL_TO_ID):  # no part of what a model is: `read_class_names` reads them
        data.pop(name, None)
    if found != kind:
        held = "does not say what it holds (no model_type)" if found is None else f"says it holds {found!r}"
        raise UserError(f"{directory}: expected a {kind}, but {CONFIG_NAME} {held}")
    return validate(config_type, data, str(directory / CONFIG_NAME))


def read_pretrained(
    directory: Path | str, config_type: type[ConfigT], kind: str, prefix: str = ""
) -> tuple[ConfigT, dict[str, Tensor]]:
    """The config and the state dict (of names that start with `prefix`) in a directory of `save_pretrained`."""
    directory = Path(directory)
    config = read_config(directory, config_type, kind)
    return config, read_state_dict(directory, prefix)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG_NAME).exists():
        raise UserError(
            f"{directory}: no {CONFIG_NAME} here; expected a directory that save_pretrained wrote to the end, such as "
            "`best` or `last` of a run; `mepa export` makes one of a checkpoint"
        )
    return read_json(directory / CONFIG_NAME)
