"""Errors of one's own, and those that another rank's end has caused."""

from __future__ import annotations

import pytest

from mepa_ds.runtime.lost_peers import is_lost_peer
from mepa_ds.slurm.in_job.cause import cause_of

ENDINGS = [
    "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:4711",
    "[gloo/transport/tcp/pair.cc:525] Read error [127.0.1.1]:4711: Connection reset by peer",
    "[gloo/transport/tcp/buffer.cc:132] Timed out waiting 1800000ms for recv operation to complete",
    "Application timeout caused pair closure",
    "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "recvValue failed on SocketImpl(fd=3, addr=[a]:1, remote=[b]:2): Connection reset by peer",
    "sendBytes failed on SocketImpl(fd=3): Broken pipe",
    "wait timeout after 600000ms, keys: /default_pg/0//cpu//1",
    "Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
    "NCCL error: remote process exited or there was a network error\nncclRemoteError: A call failed possibly due to a "
    "network error or a remote process exiting prematurely.\nLast error:\nsocketProgress: closed by remote peer",
    "NCCL communicator was aborted on rank 1.",
    "[gloo/transport/tcp/pair.cc:525] Read error [10.0.0.2]:4711: Connection timed out",
    "[gloo/transport/tcp/pair.cc:446] writev [10.0.0.2]:4711: No route to host",
    "[gloo/transport/tcp/pair.cc:540] Read timeout [10.0.0.2]:4711",
    "Socket Timeout",
]
OWN = [
    "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: ib7",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage\nncclInvalidUsage: This usually reflects invalid usage of "
    "NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
    "NCCL error: unhandled cuda error",
    "Gloo: AllToAll does not support this process group's backend",
    "The server socket has failed to listen on any local network address. port: 4711, EADDRINUSE",
    "No backend type associated with device type cpu; the process group has nccl alone",
    "Tensor sizes of peers differ",
    "PytorchStreamReader failed reading file data/0: read error",
]


@pytest.mark.parametrize("message", ENDINGS)
def test_connections_that_ended(message: str) -> None:
    assert is_lost_peer(message)


@pytest.mark.parametrize("message", OWN)
def test_a_librarys_name_makes_no_lost_peer(message: str) -> None:
    assert not is_lost_peer(message)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_cause_counts_before_the_lost_peers_whoever_is_faster(ending: str) -> None:
    lost, line = f"[rank0]: RuntimeError: {ending.splitlines()[0]}", "slurmstepd: error: Detected 1 oom_kill event"
    summary = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "
    assert cause_of(f"{lost}\n{summary}\n{line}") == line
    assert cause_of(f"{lost}\n{summary}\n[rank1]: KeyError: 'x'\n") == "KeyError: 'x'"
    assert cause_of(f"{lost}\n{summary}") == lost.removeprefix("[rank0]: ")
    own = f"rank 0 failed: RuntimeError: {ending.splitlines()[0]}"
    assert cause_of(f"error: {own}\nTraceback\n{lost}\nKeyError: 'later'") == own
