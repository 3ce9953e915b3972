"""What every entry point shares: one clear message for a user's mistake, exit status 2, on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.errors import UserError


def run(main: Callable[[], object]) -> None:
    """Runs `main`; a UserError is printed once and ends every rank with status 2."""
    try:
        main()
        distributed.stop(together=True)
    except SystemExit:  # a deliberate end (help, "requeue me"), on every rank
        distributed.stop(together=True)
        raise
    except UserError as error:
        # Before the ranks meet all of them read the same command line; afterwards one may stand alone with its error.
        alone = dist.is_initialized() and not error.agreed
        if distributed.read_launch().is_main or alone:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        distributed.stop()
