"""What every entry point shares: one clear message for a user's mistake, exit status 2, on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mepa_ds import distributed
from mepa_ds.errors import UserError


def run(main: Callable[[], object]) -> None:
    """Runs `main`; a UserError is printed by rank 0 alone and ends every rank with status 2."""
    try:
        main()
    except UserError as error:
        if distributed.read_launch().is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        distributed.stop()
