"""The run's output_dir before anything is trained: writable, seen by all ranks, without a killed run's leftovers."""

from __future__ import annotations

import secrets
import socket
import time

import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine.checkpoint_files import clean
from mepa_ds.errors import UserError
from mepa_ds.loops.recorder import check_output

# A network file system shows another node's new file late (NFS: up to its attribute cache's age).
_VISIBLE_SECONDS = 5.0


def prepare_output(config: PretrainConfig) -> None:
    """Raises UserError, on every rank, when the main rank cannot write there or another does not see it. Collective."""
    error: UserError | None = None
    if distributed.is_main():
        try:
            check_output(config)
            clean(config.output_dir)
            clean(config.output_dir / "checkpoints")
        except UserError as raised:
            error = raised
    distributed.agree(error)
    if distributed.world_size() > 1:
        _check_shared(config)


def _check_shared(config: PretrainConfig) -> None:
    """Every rank writes its part of a checkpoint: all must see the same directory."""
    name = [f".probe.{secrets.token_hex(4)}"]
    dist.broadcast_object_list(name, src=0)
    probe = config.output_dir / name[0]
    if distributed.is_main():
        probe.write_text("")
    dist.barrier()
    end = time.monotonic() + _VISIBLE_SECONDS
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.1)
    error: UserError | None = None
    if not probe.exists():
        error = UserError(
            f"output_dir: {config.output_dir}: node {socket.gethostname()} does not see what rank 0 writes there; "
            "it must lie on a file system that all nodes share"
        )
    try:
        distributed.agree(error)
    finally:
        if distributed.is_main():
            probe.unlink(missing_ok=True)
