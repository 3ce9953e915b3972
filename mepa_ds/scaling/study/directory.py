"""The output_dir of planned runs (a scaling study, an ablation, a sweep): its file, its plan, its recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mepa_ds import shipped
from mepa_ds.config.base import Section, dump_yaml, load_config, read_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.safety.reading import read_json_object

PLAN_NAME = "plan.json"
FileT = TypeVar("FileT", bound=Section)


def read_file(kind: type[FileT], path: Path, what: str) -> FileT:
    """Reads a file, or the one in the output_dir of planned runs. `what` ("study", "ablation") names that one too.

    Raises:
        UserError: the file cannot be read, or has unknown or wrong keys; each is named.
    """
    name = f"{what}.yaml"
    found = path / name if path.is_dir() else shipped.find(path)
    if path.is_dir() and not found.is_file():
        raise UserError(f"{path}: no {name} there; give the file of {_a(what)}, or the output_dir of a planned one")
    return load_config(kind, found)


def check_directory(output_dir: Path, name: str, what: str) -> None:
    """Raises UserError when the directory holds planned runs of another name, or runs that nobody planned."""
    path = output_dir / f"{what}.yaml"
    if path.is_file():
        theirs = read_yaml(path).get("name")
        if theirs != name:
            raise UserError(
                f"{output_dir}: holds the {what} {theirs!r}, and this one is {name!r}; give it an output_dir of its own"
            )
    elif output_dir.is_dir() and any((output_dir / entry).exists() for entry in ("runs", PLAN_NAME)):
        raise UserError(f"{output_dir}: has runs, but no {path.name}; choose an empty output_dir")


def write_recipes(output_dir: Path, recipes: Mapping[str, PretrainConfig], names: set[str]) -> None:
    """Writes recipes/RUN.yaml for each recipe, and removes those of runs that are not among `names`."""
    folder = output_dir / "recipes"
    for run, recipe in recipes.items():
        path, text = folder / f"{run}.yaml", dump_yaml(recipe)
        if not path.is_file() or path.read_text() != text:
            write_text(path, text)
    for path in folder.glob("*.yaml"):
        if path.stem not in names and _is_of_a_plan(path, output_dir):
            path.unlink()


def _is_of_a_plan(path: Path, output_dir: Path) -> bool:
    """Whether a recipe is that of a run of an earlier plan. Others may lie there where output_dir is a clone."""
    try:
        place = read_yaml(path).get("output_dir")
    except UserError:
        return False
    return isinstance(place, str) and Path(place) == output_dir / "runs" / path.stem


def read_rows(output_dir: Path, expected_hash: str, what: str, planner: str) -> list[dict[str, Any]]:
    """Returns the rows of the plan, one a run.

    Args:
        expected_hash: of what the runs are by today's file; the plan has the one that it was made by.
        planner: the command that plans.

    Raises:
        UserError: there is no plan, or the file has changed since.
    """
    path = output_dir / PLAN_NAME
    if not path.is_file():
        raise UserError(f"{path}: the {what} is not planned yet; run {planner} first")
    try:
        facts = read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run {planner} again") from None
    if facts.get(f"{what}_hash") != expected_hash:
        raise UserError(f"{path}: the {what} file has changed since it was planned; run {planner} again")
    rows = facts.get("runs")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: it has no list of runs; run {planner} again")
    return rows


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeio" else f"a {what}"
