"""Pretrain a MEPA model: `python pretrain.py RECIPE [key=value ...]`, alone or under any launcher."""

import sys

from mepa_ds.command_line import entry


def main() -> None:
    from mepa_ds.cli import pretrain

    pretrain.main(sys.argv[1:])


if __name__ == "__main__":
    entry.run(main)
