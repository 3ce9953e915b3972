"""`mepa quickstart`: the whole system on real images, stage by stage, with the commands that a user would type.

It is what `mepa init digits --run` does, with the shipped recipes, in the working directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mepa_ds import log
from mepa_ds.command_line import entry

if TYPE_CHECKING:
    from mepa_ds.project.choosing.choices import Choices
    from mepa_ds.project.layout import Layout
    from mepa_ds.project.looking.facts import ImageFacts

DATA, RUNS = Path("data/digits-32"), Path("runs/quickstart")
TOKENIZER_RECIPE, RECIPE = Path("recipes/tokenizer_quickstart.yaml"), Path("recipes/quickstart.yaml")


def project() -> tuple[ImageFacts, Choices, Layout]:
    """The quickstart as a project: of the digits, with the choices that its recipes were written from."""
    from mepa_ds.project.choosing.choose import choose
    from mepa_ds.project.layout import Layout
    from mepa_ds.project.looking.digits import DIGITS_FACTS
    from mepa_ds.project.looking.facts import MachineFacts

    return DIGITS_FACTS, choose(DIGITS_FACTS, MachineFacts()), Layout(DATA, RUNS, TOKENIZER_RECIPE, RECIPE)


def main(argv: list[str]) -> None:
    if argv:
        usage = f"usage: mepa quickstart     (no options; it writes to {DATA.parent}/ and {RUNS}/ here)"
        log.say(f"{__doc__}\n{usage}")
        sys.exit(0 if argv[0] in ("-h", "--help") else 2)
    log.make_stdout_a_log()
    from mepa_ds.project.running import run_project

    run_project(*project(), Path(), "quickstart")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
