"""The option `--remote-schemes`, alike in every command that reads shard sets."""

from __future__ import annotations

from typing import Annotated

import tyro

from mepa_ds.config.values import RemoteScheme

RemoteSchemes = Annotated[
    tuple[RemoteScheme, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        help="Schemes that remote.json of a set may name beside the web and stores: `pipe` runs its shell commands. "
        "Only for sets that you trust."
    ),
]
"""Given once for each scheme."""
