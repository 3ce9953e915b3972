"""Pretrain a MEPA model: `python pretrain.py RECIPE [key=value ...]`, alone or under any launcher."""

import sys

from mepa_ds.cli import entry
from mepa_ds.cli.pretrain import main

if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
