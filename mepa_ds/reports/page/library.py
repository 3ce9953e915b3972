"""The library that draws the charts in the page: Vega and Vega-Lite, as vl-convert has them in its package."""

from __future__ import annotations

import gzip
import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path

PACKAGE = "vl-convert-python"
NOTICE = (
    "Charts are drawn by Vega, Vega-Lite and Vega-Embed, copyright 2015-2025 University of Washington Interactive Data "
    "Lab and contributors, BSD 3-Clause License."
)
_EXPORTED = "window.vegaEmbed = vegaEmbed;"  # it alone: the package gives no other way to the two libraries


def chart_library() -> bytes:
    """Returns the library's JavaScript, compressed by gzip. It is the same for every page.

    Putting it together takes seconds, so it is kept in the user's cache (XDG_CACHE_HOME, ~/.cache).

    Raises:
        UserError: the package is not installed.
    """
    try:
        version = metadata.version(PACKAGE)
        import vl_convert
    except ImportError as error:  # PackageNotFoundError too
        raise UserError(
            f"the page needs the package {PACKAGE}, which has the charts' library; run: pip install {PACKAGE}"
        ) from error
    kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mepa_ds" / f"vega-{version}.js.gz"
    with suppress(OSError, EOFError, ValueError):
        found = kept.read_bytes()
        if _EXPORTED[:16] in gzip.decompress(found).decode():
            return found
    made = gzip.compress(vl_convert.javascript_bundle(_EXPORTED).encode(), mtime=0)
    with suppress(OSError), atomic_path(kept) as temporary:  # without a home it is made anew each time
        temporary.write_bytes(made)
    return made
