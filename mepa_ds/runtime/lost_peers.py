"""Recognises errors of PyTorch's collectives that only mean a lost peer, whose report or the system has the cause."""

from __future__ import annotations

import re

# Messages of gloo, the store and NCCL about connections that ended, and about peers that never came. A message that
# only has a library's name in it ("gloo: unable to find address for: ib7", "NCCL error: duplicate GPU") is different.
_ENDING = re.compile(
    r"connection (?:was (?:likely )?)?closed|closed by (?:remote )?peer|peer closed|connection reset|broken pipe"
    r"|pair closure|(?:recv|send)\w* failed on|failed to (?:recv|send), (?:got|sent) 0"
    r"|timed out (?:waiting \d|after \d+ seconds waiting)|remote process exit|communicator was aborted"
    r"|collective operation timeout|connectFullMesh failed|connection refused|failed to connect to"
    r"|socket (?:unexpectedly )?closed|socket timeout|wait timeout|timeout waiting for key"
    r"|(?:read|write) (?:error|timeout) \[|writev \[|connect(?:ion)? time(?:d )?out",
    re.IGNORECASE,
)


def is_lost_peer(message: str) -> bool:
    """Returns whether the message belongs to an error that another rank's end has caused."""
    return _ENDING.search(message) is not None
