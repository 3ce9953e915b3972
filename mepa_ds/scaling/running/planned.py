"""Variants of one recipe that a file describes (an ablation, a sweep): their plan, in the output_dir of the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mepa_ds
from mepa_ds import shipped
from mepa_ds.config.base import Section, dump_yaml, read_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_json, write_text
from mepa_ds.scaling.running.run import Fleet
from mepa_ds.scaling.study import directory
from mepa_ds.scaling.study.plan import write_manifest


@dataclass(frozen=True)
class Planned:
    """What is planned, and where its plan lies."""

    what: str
    """`ablation` or `sweep`, which also names the file in output_dir."""
    command: str
    """The command that plans."""
    file: Section
    name: str
    base: Path
    """The recipe that all runs start from."""
    output_dir: Path
    ranks: int
    """Processes of each run."""
    content: Mapping[str, Any]
    """What the runs are, besides the base recipe; where they are written does not count."""
    make: Callable[[], tuple[list[dict[str, Any]], dict[str, PretrainConfig]]]
    """Multiplies out and checks: a row for each run, and the recipes by run. Raises UserError for mistakes."""

    @property
    def digest(self) -> str:
        """A hash of what the runs are."""
        content = {**self.content, "base": read_yaml(shipped.find(self.base))}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of the plan in output_dir.

        Raises:
            UserError: there is none, the file has changed since, or the directory holds something else.
        """
        self._check_directory()
        return directory.read_rows(self.output_dir, self.digest, self.what, self.command)

    def write(self) -> None:
        """Writes the file, a recipe for each run, the manifest and plan.json.

        Raises:
            UserError: see `make`; or the directory holds something else.
        """
        self._check_directory()
        rows, recipes = self.make()
        directory.write_recipes(self.output_dir, recipes, set(recipes))
        write_text(self.output_dir / f"{self.what}.yaml", dump_yaml(self.file))
        write_manifest(self.output_dir, self.name, [Path(row["recipe"]) for row in rows])
        facts = {self.what: self.name, f"{self.what}_hash": self.digest, "code_version": mepa_ds.__version__}
        write_json(self.output_dir / directory.PLAN_NAME, {**facts, "runs": rows})

    def write_if_needed(self) -> None:
        """Writes the plan unless output_dir has this very plan. Raises UserError as `write` does."""
        self._check_directory()
        with suppress(UserError):
            self.rows()
            return
        self.write()

    def fleet(self) -> Fleet:
        """The runs, which are planned first if they are not. Raises UserError as `write` does."""
        self.write_if_needed()
        return Fleet(self.name, self.output_dir, self.ranks, rows=self.rows)

    def _check_directory(self) -> None:
        directory.check_directory(self.output_dir, self.name, self.what)
