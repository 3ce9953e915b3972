"""`mepa scale`: scaling studies, one sub-command a file."""

from __future__ import annotations

import importlib
import sys

from mepa_ds import log
from mepa_ds.errors import UserError

COMMANDS = {
    "family": "parameters by kind, FLOPs by part and memory of a family of models",
    "plan": "recipes, costs and expected intervals of a study; trains nothing",
    "run": "train what is left of a study, here or on a SLURM cluster",
    "status": "how each run is doing",
    "collect": "one table of all runs, as CSV and Parquet",
    "fit": "fit laws to a table, with intervals",
    "predict": "the best model of the family for a budget, by a fitted law",
    "report": "figures and one HTML page of a study",
    "cluster": "a recipe on 8 to 1024 GPUs, simulated: time of a step by part, the best layout",
}
_EXAMPLE = """a study from start to end:
  mepa scale plan recipes/studies/ladder.yaml
  mepa scale run recipes/studies/ladder.yaml --slurm h100      (or here: --jobs 2)
  mepa scale status runs/studies/ladder
  mepa scale collect runs/studies/ladder
  mepa scale fit runs/studies/ladder/table.parquet --law chinchilla
  mepa scale predict runs/studies/ladder --flops 1e21
  mepa scale report runs/studies/ladder"""


def main(argv: list[str]) -> None:
    """Calls the sub-command that `argv` names."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<9}{meaning}" for name, meaning in COMMANDS.items()]
        log.say("usage: mepa scale COMMAND [ARGUMENTS]\n\n" + "\n".join(lines) + f"\n\n{_EXAMPLE}\n")
        log.say("mepa scale COMMAND --help explains each; docs/scaling.md explains the whole.")
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        raise UserError(f"mepa scale: no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    importlib.import_module(f"mepa_ds.cli.scale.{argv[0]}").main(argv[1:])
