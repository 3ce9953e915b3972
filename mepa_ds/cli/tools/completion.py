"""`mepa completion`: a script by which a shell completes commands and options."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.completion import Shell, Words


@dataclass
class CompletionOptions:
    """Prints a script by which a shell completes the commands and options of mepa. It takes some seconds, so keep it:

    bash   mepa completion bash > ~/.local/share/bash-completion/completions/mepa
    zsh    mepa completion zsh > ~/.mepa-completion, and `source ~/.mepa-completion` in ~/.zshrc
    fish   mepa completion fish > ~/.config/fish/completions/mepa.fish"""

    shell: tyro.conf.Positional[Shell]
    """bash, zsh or fish."""


def main(argv: list[str]) -> None:
    options = tyro.cli(CompletionOptions, prog="mepa completion", args=argv)
    from mepa_ds.command_line.completion import script

    log.answer(script(options.shell, "mepa", all_words()).removesuffix("\n"))


def all_words() -> Words:
    """All commands of mepa with their sub-commands and options, from their help texts."""
    from mepa_ds.cli import data, scale
    from mepa_ds.cli.main import COMMANDS
    from mepa_ds.command_line.completion import words_of

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # so that no usage is cut into lines
    try:
        return words_of(run, {"data": data.TOOLS, "scale": scale.COMMANDS}, COMMANDS)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def run(words: list[str]) -> None:
    """Runs a command with its words."""
    from mepa_ds.cli.main import module_of

    importlib.import_module(module_of(words[0])).main(words[1:])


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
