"""`mepa slurm submit|pipeline|status`: jobs on a SLURM cluster, checked before they are submitted."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable

from mepa_ds import log, shipped
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import path_argument
from mepa_ds.errors import UserError
from mepa_ds.slurm.pipeline import Tool, run_pipeline
from mepa_ds.slurm.profile import read_profile, root
from mepa_ds.slurm.status import format_status, status
from mepa_ds.slurm.submit import JOBS, Request, submit_recipe


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mepa slurm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _submit_options(commands.add_parser("submit", help="check a recipe against the cluster and submit it"))
    pipeline = commands.add_parser(
        "pipeline", help="shards, tokens and features, pretraining, samples: one chain of jobs"
    )
    pipeline.add_argument("file", type=path_argument, help="YAML file, such as slurm/pipeline_imagenet256.yaml")
    _common_options(pipeline)
    show = commands.add_parser(
        "status", help="state, restarts, step, throughput, time left, last error, last checkpoint"
    )
    show.add_argument("run", type=path_argument, help="output_dir of a run")
    show.add_argument("--json", action="store_true", help="for programs")
    # argparse takes no positional words after options.
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments, rest = parser.parse_known_args(argv[:cut])
    if rest:
        hint = "; put key=value words at the end, after --" if any("=" in word for word in rest) else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    # Paths on the command line are relative to the caller's directory; paths in recipes and pipelines to the clone.
    for name in ("recipe", "file", "run"):
        if name in arguments:
            setattr(arguments, name, shipped.find(getattr(arguments, name)).resolve())
    if arguments.command != "status":
        profile = read_profile(arguments.cluster)
        os.chdir(root())
    if arguments.command == "status":
        report = status(arguments.run)
        log.say(json.dumps(report) if arguments.json else format_status(report))
    elif arguments.command == "pipeline":
        log.make_stdout_a_log()
        run_pipeline(arguments.file, profile, arguments.dry_run, check_words)
    else:
        request = Request(
            recipe=arguments.recipe,
            overrides=(*arguments.overrides, *argv[cut + 1 :]),
            job=arguments.job,
            nodes=arguments.nodes,
            gpus=arguments.gpus,
            time=arguments.time,
            after=tuple(arguments.after or ()),
            limit=arguments.limit,
            copies_sets=arguments.stage,
            dry_run=arguments.dry_run,
        )
        log.make_stdout_a_log()  # a job stays submitted even if its number cannot be printed
        submit_recipe(request, profile)


def check_words(tool: Tool, words: list[str]) -> None:
    """Parses a command of a pipeline as the tool itself will.

    Raises:
        UserError: the tool does not accept it. The tool's own message has been printed.
    """
    from mepa_ds.cli import sample
    from mepa_ds.data_tools import build_shards, precompute

    parsers: dict[Tool, Callable[[list[str]], object]]
    parsers = {"build_shards": build_shards.parse, "precompute": precompute.parse, "sample": sample.parse}
    try:
        parsers[tool](words)
    except SystemExit:
        raise UserError(f"{shlex.join(words)}: {tool} does not accept this command; its message is above") from None


def _common_options(parser: argparse.ArgumentParser) -> None:
    cluster = os.environ.get("MEPA_CLUSTER")
    parser.add_argument("--cluster", default=cluster, help="profile in slurm/clusters/, or a file NAME.env")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the sbatch line, submit nothing"
    )


def _submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=path_argument, help="YAML file; for scaling-study a manifest: RECIPE [key=value ...] a line"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="after --, such as train.steps=100"
    )
    _common_options(parser)
    parser.add_argument("--job", choices=sorted(JOBS), default="pretrain", help="what the recipe is for")
    parser.add_argument("--nodes", type=int, default=1, help="each with the profile's GPUs [default: 1]")
    parser.add_argument("--gpus", type=int, help="a node [default: the profile's]")
    parser.add_argument("--time", help="limit of one start, such as 12:00:00 [default: the profile's]")
    parser.add_argument("--after", action="append", metavar="JOB", help="start when this job has succeeded")
    parser.add_argument("--limit", type=int, default=8, help="members of a scaling study that run at once")
    parser.add_argument("--stage", action="store_true", help="copy the shard sets to every node's own disk first")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
