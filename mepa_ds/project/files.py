"""The files of a project's directory: written once, and never over what a person has edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mepa_ds.errors import UserError
from mepa_ds.files import write_json, write_text
from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts
from mepa_ds.safety.reading import read_json_object
from mepa_ds.safety.text import printable

NAME = "project.json"
_VERSION = 1
_CHOICES = TypeAdapter(Choices)


@dataclass(frozen=True)
class Written:
    """What an earlier `mepa init` wrote here."""

    asked: dict[str, Any]
    images: dict[str, Any]
    choices: Choices
    digests: dict[str, str]
    """SHA-256 of each file's text, as it was written."""


def check_place(out: Path, source: str) -> None:
    """Raises UserError where a project cannot be: inside the images, or among other things."""
    shown = printable(str(out))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {shown}: is a file; give a directory that is new or empty")
    folder = Path(source)
    if folder.is_dir() and (out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents):
        raise UserError(
            f"--out: {shown}: is inside the images' folder, where it would be taken for a class; give another"
        )
    if out.is_dir() and not (out / NAME).exists() and any(out.iterdir()):
        raise UserError(f"--out: {shown}: holds other things, and no {NAME}; give a directory that is new or empty")


def read(out: Path) -> Written | None:
    """None where nothing has been written. Raises UserError for a file that is no project's."""
    path = out / NAME
    if not path.exists():
        return None
    try:
        data = read_json_object(path)
        if data["version"] != _VERSION:
            raise ValueError(f"version {str(data['version'])[:20]}")
        asked, images, digests = (_object(data, name) for name in ("asked", "images", "files"))
        if strange := [name for name in digests if Path(name).name != name]:
            raise ValueError(f"files: {strange[0][:100]!r} is no name of a file beside it")
        return Written(asked, images, _CHOICES.validate_json(json.dumps(data["choices"])), digests)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"{printable(str(path))}: cannot be read ({reason}); remove it, and recipes are written anew"
        ) from error


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(data[name], dict):
        raise ValueError(f"{name} is no object")
    found: dict[str, Any] = data[name]
    return found


def edited(out: Path, written: Written) -> list[str]:
    """Names of files that are no longer as they were written; one that was removed is not among them."""
    return [
        name
        for name, digest in written.digests.items()
        if (out / name).is_file() and _digest((out / name).read_text(errors="replace")) != digest
    ]


def write(
    out: Path,
    texts: Mapping[str, str],
    asked: dict[str, Any],
    images: ImageFacts,
    machine: MachineFacts,
    chosen: Choices,
) -> None:
    """Writes the texts by name, and project.json with the facts and choices behind them."""
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(
        out / NAME,
        {
            "version": _VERSION,
            "asked": asked,
            "images": as_json(images),
            "machine": asdict(machine),
            "choices": asdict(chosen),
            "files": {name: _digest(text) for name, text in texts.items()},
        },
    )


def as_json(images: ImageFacts) -> dict[str, Any]:
    """As it is read back."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(images)))
    return data


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def restore(out: Path, before: Written, texts: Mapping[str, str]) -> None:
    """Writes those of the texts whose files are not there; project.json then knows them."""
    missing = {name: text for name, text in texts.items() if not (out / name).exists()}
    if not missing:
        return
    for name, text in missing.items():
        write_text(out / name, text)
    data = read_json_object(out / NAME)
    data["files"] = {**before.digests, **{name: _digest(text) for name, text in missing.items()}}
    write_json(out / NAME, data)
