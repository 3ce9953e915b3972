from typing import Any

from mepa_ds.moved.names import moved_name


def __getattr__(name: str) -> Any:
    """What the module of this name had before version 0.2; to be deleted with version 0.3."""
    return moved_name("data.remote", name)
