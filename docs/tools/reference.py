"""Writes docs/reference/: every command with its help, and every key of the recipes, from the code itself.

python docs/tools/reference.py            writes the pages
python docs/tools/reference.py --check    ends with status 1 if a page lacks what the code says
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mepa_ds.config.base import Key

os.environ |= {"COLUMNS": "110", "NO_COLOR": "1"}
PAGES = Path(__file__).parent.parent / "reference"
_GENERATED = "<!-- Written by docs/tools/reference.py; `make reference` writes it anew. -->\n\n"
_RECIPE_KEYS = "keys of the recipe, each also an override:"


def main(words: list[str]) -> None:
    pages = {"commands.md": "".join(commands_page()), "recipes.md": "".join(recipes_page())}
    if words == ["--check"]:
        if stale := [name for name, text in pages.items() if _gist(PAGES / name) != _gist(text)]:
            sys.exit(f"docs/reference: {', '.join(stale)} not what the code says; run: make reference")
        return
    for name, text in pages.items():
        (PAGES / name).write_text(text)


def _gist(page: Path | str) -> list[str]:
    """The headings, options and keys of a page: how a help is laid out depends on versions of Python and tyro."""
    text = page if isinstance(page, str) else page.read_text() if page.exists() else ""
    return re.findall(r"(?m)^#.*$|^\| `.*$|--[a-z][\w-]*", text)


def commands_page() -> Iterator[str]:
    """Yields the page of all commands: `mepa COMMAND --help`, sub-commands below."""
    from mepa_ds.cli.main import COMMANDS, usage
    from mepa_ds.cli.tools.completion import all_words, run

    yield f"# Commands\n\n{_GENERATED}```\n{usage()}\n```\n"
    helps = {path: help_of(run, list(path)) for path, _ in all_words().walk() if path}
    for path, text in helps.items():
        if len(path) > 1 and path[-1] not in text.partition("\n")[0].split():
            continue  # no sub-command, but a word that stands in the place of one
        if len(path) == 1:
            meaning = COMMANDS[path[0]]
            yield f"\n## mepa {path[0]}\n\n{meaning[0].upper()}{meaning[1:]}.\n"
        else:
            yield f"\n### mepa {' '.join(path)}\n"
        yield f"\n```text\n{text.split(_RECIPE_KEYS)[0].rstrip()}\n```\n"
        if _RECIPE_KEYS in text:
            yield "\nIts keys: [recipes](recipes.md).\n"


def help_of(command: Callable[[list[str]], object], words: list[str]) -> str:
    """Returns what the command prints for `--help`, without the frames around it."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        command([*words, "--help"])
    text = re.sub(r"(?m)^╭─ (.+?) ─+╮$", r"\n\1:", printed.getvalue())
    text = re.sub(r"(?m)^╰─+╯$", "", text)
    text = re.sub(r"(?m)^│ (.*?) *│$", r"  \1", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m) +$", "", text)).strip()


def recipes_page() -> Iterator[str]:
    """Yields the page of all keys of all files that a user writes."""
    from mepa_ds.ablation.config import AblationConfig
    from mepa_ds.config.base import keys_of
    from mepa_ds.config.pretrain import PretrainConfig
    from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
    from mepa_ds.scaling.study.config import StudyConfig
    from mepa_ds.slurm.pipeline import PipelineConfig
    from mepa_ds.sweep.config import SweepConfig

    yield (
        f"# Recipes\n\n{_GENERATED}Every key can be set in the file or, for the two recipes, on the command line "
        "(`train.steps=100`). Keys without a default are marked *required*. A section is left out with `null` where "
        "that is said.\n"
    )
    kinds = {
        "Pretraining: `mepa pretrain RECIPE`": PretrainConfig,
        "Training of a tokenizer: `mepa train-tokenizer RECIPE`": TokenizerTrainingConfig,
        "Scaling study: `mepa scale plan STUDY`": StudyConfig,
        "Sweep: `mepa sweep FILE`": SweepConfig,
        "Ablation: `mepa ablate FILE`": AblationConfig,
        "Pipeline of jobs: `mepa slurm pipeline FILE`": PipelineConfig,
    }
    for title, config_type in kinds.items():
        yield f"\n## {title}\n"
        keys = list(keys_of(config_type))
        yield from _table([key for key in keys if "." not in key.name])
        for section in (key for key in keys if key.is_section):
            nullable = " May be `null`." if section.may_be_null else ""
            yield f"\n### `{section.name}`\n\n{_cell(section.meaning).removesuffix('.')}.{nullable}\n"
            yield from _table([key for key in keys if key.name.rpartition(".")[0] == section.name])


def _table(keys: Sequence[Key]) -> Iterator[str]:
    rows = [key for key in keys if not key.is_section]
    if rows:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for key in rows:
        default = "*required*" if key.default == "required" else f"`{_cell(key.default)}`"
        yield f"| `{key.name}` | {_cell(key.type)} | {default} | {_cell(key.meaning)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main(sys.argv[1:])
