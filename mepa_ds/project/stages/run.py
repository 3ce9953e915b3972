"""Stages of a project: commands that are run one after another, once each, and continued after a stop."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from mepa_ds import log, shipped
from mepa_ds.errors import UserError
from mepa_ds.files import make_way, rename_aside, write_json
from mepa_ds.project.stages.display import Display, Expected
from mepa_ds.project.stages.processes import run_python
from mepa_ds.safety.reading import read_json_object


@dataclass(frozen=True)
class Stage:
    """Commands (the words after the Python interpreter) and their outputs."""

    name: str
    meaning: str
    commands: tuple[str, ...]
    outputs: tuple[Path, ...]
    results: tuple[Path, ...]
    """Files in `outputs` that are there when the commands are done."""
    expected: Expected = field(default_factory=Expected)
    """How long it takes, as far as that is known beforehand."""
    inputs: str = ""
    """What it reads that neither its commands nor its recipes tell, in any words: if they change, it starts anew."""


@dataclass
class Spent:
    """Time and memory that a stage has taken, over all its starts."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Peak memory of the largest process."""
    processor_seconds: float = 0.0
    """Of all its processes: less than cores x seconds where other programs had the cores."""
    done: bool = False
    work: str = ""
    """Hash of its commands and recipes at its last start."""


_SPENT = TypeAdapter(Spent)

_TYPED = (
    (re.compile(r"-m torch\.distributed\.run "), "torchrun "),
    (re.compile(r"-m mepa_ds "), "mepa "),
)


def as_typed(command: str) -> str:
    """A stage's command as a person types it: `mepa ...` or `torchrun ...`."""
    for pattern, typed in _TYPED:
        if pattern.match(command):
            return pattern.sub(typed, command, count=1)
    return f"python {command}"


class StageRun:
    """Runs stages in the working directory; what each took is kept in `progress_file`.

    Args:
        program: begins messages, such as `quickstart`.
        threads: of each process under torchrun.
    """

    def __init__(self, stages: Sequence[Stage], progress_file: Path, program: str, threads: int = 1):
        self.stages, self._file, self._program, self._threads = tuple(stages), progress_file, program, threads
        self.spent = {stage.name: Spent() for stage in self.stages}
        if progress_file.exists():
            self._recall()

    def _recall(self) -> None:
        try:
            known = read_json_object(self._file)
            self.spent = {name: _SPENT.validate_python(known.get(name, {})) for name in self.spent}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._file}: cannot be read ({' '.join(str(error).split())[:300]}); remove it, and every stage runs "
                "again"
            ) from error

    def run(self, finish: Callable[[str, StageRun], None]) -> None:
        """Runs what is not done; `finish` is the last stage, which runs always, and gets its place ("[7/7]").

        Raises:
            UserError: a command has failed. The next `run` continues there.
        """
        count = len(self.stages) + 1
        with Display([stage.expected for stage in self.stages], [stage.name for stage in self.stages]) as display:
            for number, stage in enumerate(self.stages, start=1):
                place, mine = f"[{number}/{count}]", self.spent[stage.name]
                if mine.work not in ("", _work(stage)):
                    changed = "images or options have" if stage.inputs else "recipe has"
                    display.say(f"{place} {stage.name}: its {changed} changed, it starts anew")
                    self._forget([stage])
                if self.spent[stage.name].done and all(path.exists() for path in stage.results):
                    display.say(f"{place} {stage.name}: finished before, skipped")
                    display.skip(number - 1)
                    continue
                was_done = self.spent[stage.name].done  # it was, but its results have been removed since
                self._forget(self.stages[number - 1 if was_done else number :])
                self._run(stage, number - 1, place, display)
        finish(f"[{count}/{count}]", self)

    def _forget(self, stages: Sequence[Stage]) -> None:
        """Removes the outputs of stages whose inputs are made anew: a report must not mix two runs.

        What is there although the stage has never run is not ours: it is renamed, and told of.
        """
        for stage in stages:
            is_known = self.spent[stage.name].work != ""
            self.spent[stage.name] = Spent()
            for path in stage.outputs:
                if is_known or path.is_symlink() or not os.path.lexists(path):
                    make_way(path)
                else:
                    aside = rename_aside(path, "before")
                    log.note(f"{path}: was there before, and no stage here has made it; it is {aside} now")

    def _run(self, stage: Stage, index: int, place: str, display: Display) -> None:
        mine = self.spent[stage.name]
        left = display.begin(index, mine.seconds)
        display.say(f"{place} {stage.name}: {stage.meaning}{left}")
        mine.work = _work(stage)
        before, started = mine.seconds, time.perf_counter()
        for command in stage.commands:
            display.say(f"      $ {as_typed(command)}")
            try:
                code, usage = run_python(command, display, self._threads)
                mine.peak_memory_bytes = max(mine.peak_memory_bytes, usage.ru_maxrss * 1024)
                mine.processor_seconds = round(mine.processor_seconds + usage.ru_utime + usage.ru_stime, 2)
            finally:  # an interrupted start counts too
                mine.seconds = round(before + time.perf_counter() - started, 2)
                self._write()
            if code:
                raise UserError(
                    f"{self._program}: stage {stage.name} ended with status {code} (its own message is above); "
                    "start it again: it continues here"
                )
        mine.done = True
        self._write()
        display.end(index, mine.seconds)
        display.say(f"{place} {stage.name}: done in {mine.seconds:.1f} s")

    def _write(self) -> None:
        write_json(self._file, {name: asdict(stage) for name, stage in self.spent.items()})


def _work(stage: Stage) -> str:
    recipes = [Path(word) for command in stage.commands for word in shlex.split(command) if word.endswith(".yaml")]
    texts = [*stage.commands, *(shipped.find(path).read_text() for path in recipes)]
    text = "\n".join([*texts, stage.inputs] if stage.inputs else texts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_word(path: Path) -> str:
    """A path as a word of a shell's command line."""
    return shlex.quote(os.fspath(path))
