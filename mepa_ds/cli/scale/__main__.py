"""`python -m mepa_ds.cli.scale`."""

from __future__ import annotations

import sys

from mepa_ds.cli.scale import main
from mepa_ds.command_line import entry

entry.run(lambda: main(sys.argv[1:]))
