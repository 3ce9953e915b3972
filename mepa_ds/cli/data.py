"""`mepa data build|precompute|fit-teacher|verify|show|merge|scan|remote`: how shard sets come into being.

They are the programs of `data_tools/`, which a clone can also start as `python data_tools/build_shards.py` and so on.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass

from mepa_ds import log
from mepa_ds.command_line import entry


@dataclass(frozen=True)
class Tool:
    """A program of `data_tools/`. `words`: the sub-command of it that is meant."""

    module: str
    meaning: str
    words: tuple[str, ...] = ()


TOOLS = {
    "build": Tool("build_shards", "images of a folder, a tar or an export, as an image set"),
    "precompute": Tool("precompute", "token maps and teacher features of an image set"),
    "fit-teacher": Tool("precompute", "a teacher made from the training images, without a download", ("fit-teacher",)),
    "verify": Tool("verify_shards", "is a set whole? its classes, copies, damage; --repair"),
    "show": Tool("show_shards", "a contact sheet: images, reconstructions, features"),
    "merge": Tool("merge_index", "the index of a set whose parts were written apart", ("merge",)),
    "scan": Tool("merge_index", "an index for WebDataset shards that others made", ("scan",)),
    "remote": Tool("merge_index", "the index of a set behind a URL", ("remote",)),
}


def usage() -> str:
    lines = [f"  {name:<12} {tool.meaning}" for name, tool in TOOLS.items()]
    return "usage: mepa data COMMAND [ARGUMENTS]\n\n" + "\n".join(lines) + "\n\nmepa data COMMAND --help explains each."


def main(argv: list[str]) -> None:
    name, rest = (argv[:1] or [""])[0], argv[1:]
    if name in TOOLS:
        tool = TOOLS[name]
        prog = "mepa data" if tool.words else f"mepa data {name}"
        importlib.import_module(f"mepa_ds.data_tools.{tool.module}").main([*tool.words, *rest], prog=prog)
    elif name in ("-h", "--help"):
        log.say(usage())
        sys.exit(0)
    else:
        near = difflib.get_close_matches(name, TOOLS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        log.say(f"error: no tool {name!r}{hint}\n{usage()}" if name else usage(), to_stderr=bool(name))
        sys.exit(2)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
