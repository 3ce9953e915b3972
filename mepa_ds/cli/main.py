"""The `mepa` command: one sub-command a module, imported when called."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import mepa_ds
from mepa_ds import log
from mepa_ds.command_line import entry

COMMANDS = {
    "init": "from a folder of images to recipes and commands, or to a trained model",
    "quickstart": "the whole system on real images, in minutes, on a CPU",
    "data": "image, token and feature sets: build, precompute, verify, show, merge",
    "doctor": "is this machine ready? versions, GPUs, disks, shard sets, weights, each with its remedy",
    "pretrain": "pretrain a model by a recipe (as pretrain.py)",
    "train-tokenizer": "train a multi-scale tokenizer by a recipe",
    "sample": "generate images, class by class",
    "evaluate": "scores of images: FID, precision, recall, class agreement and others",
    "evaluate-tokenizer": "PSNR, SSIM, LPIPS, rFID and the use of the codebook of a tokenizer",
    "serve": "a local web page that draws images of a model",
    "watch": "runs as they go on, in a terminal: loss, held-out score, speed, time left",
    "inspect": "pictures of what a model does: scales, experts, teacher, guidance",
    "upcycle": "a mixture-of-experts model from a dense one's weights",
    "export": "weights of a run or a checkpoint for others: safetensors, a model card, the Hugging Face hub",
    "checkpoint": "list, verify and compare the checkpoints of a run",
    "ablate": "train every arm of an ablation with several seeds, and compare them",
    "sweep": "train a recipe with many values of its keys, here or on SLURM, and sort what came out",
    "scale": "scaling studies: plan, run, collect, fit, predict, report",
    "slurm": "jobs on a SLURM cluster: submit, pipeline, status",
    "report": "what runs did: a table, and a page with curves, pictures and events",
    "completion": "a script by which bash, zsh or fish completes commands and options",
}

GROUPS = {
    "start here": ("init", "quickstart", "doctor"),
    "data": ("data",),
    "train": ("pretrain", "train-tokenizer", "upcycle"),
    "look": ("watch", "report", "sample", "serve", "evaluate", "evaluate-tokenizer", "inspect"),
    "studies": ("sweep", "ablate", "scale"),
    "cluster": ("slurm",),
    "files": ("export", "checkpoint", "completion"),
}
"""Commands by what they are for, as `mepa --help` shows them."""


_FOLDERS = dict.fromkeys(("ablate", "evaluate", "evaluate-tokenizer", "inspect", "report", "serve"), "results") | (
    dict.fromkeys(("completion", "doctor", "sweep", "watch"), "tools")
)
"""Folders of commands that are not in this one."""


def usage() -> str:
    """Commands by group. Those of no group come last, so that none is forgotten."""
    grouped = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in COMMANDS if name not in grouped)
    lines = ["usage: mepa COMMAND [ARGUMENTS] | --version"]
    for title, names in [*GROUPS.items(), *([("others", rest)] if rest else [])]:
        lines += ["", title, *(f"  {name:<18} {COMMANDS[name]}" for name in names if name in COMMANDS)]
    return "\n".join([*lines, "", "mepa COMMAND --help explains each."])


def module_of(command: str) -> str:
    folder = f"{_FOLDERS[command]}." if command in _FOLDERS else ""
    return f"mepa_ds.cli.{folder}{command.replace('-', '_')}"


def version() -> str:
    """Of this package and the two that decide what it can do; none of them is imported for that."""
    return f"mepa_ds {mepa_ds.__version__} (torch {_version_of('torch')}, deepspeed {_version_of('deepspeed')})"


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Entry point of the console script."""
    name, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in COMMANDS:
        entry.run(lambda: importlib.import_module(module_of(name)).main(rest))
    else:
        entry.run(lambda: _answer(name), reads_options=False)


def _answer(word: str) -> None:
    """Answers a first word that is no command."""
    if word in ("-V", "--version"):
        log.say(version())
    elif word in ("-h", "--help"):
        log.say(usage())
        sys.exit(0)
    else:
        log.say(f"error: no command {word!r}\n{usage()}" if word else usage(), to_stderr=bool(word))
        sys.exit(2)


if __name__ == "__main__":
    main()
