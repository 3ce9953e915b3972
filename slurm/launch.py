"""Starts one rank, or one node's torchrun, inside a SLURM step: `launch.py rank|torchrun STATE COMMAND...`.

rank       sets RANK and its like from srun's variables (torchrun has set them already), runs COMMAND, passes signals on
           to it, and writes its exit status to STATE/exit-<job>/<rank>: launchers report some other number. COMMAND
           that SIGUSR1 ends has no handler for it: a run before its first line, or a tool that resumes by itself. That
           counts as "start me again". When STATE/owner names another start of the run, COMMAND is killed: SLURM has
           given the run to other nodes.
torchrun   runs `launch.py rank` on all local ranks under torchrun. torchrun would die of SIGUSR1 and kill its ranks
           half a minute after SIGTERM, so it is kept from these; the ranks get SIGUSR1 from here.

Only the standard library: this runs in every rank, before anything else.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OWNER_CHECK_SECONDS = 10.0
REQUEUE_CODE = 75  # as in lib.sh: "not done yet, start me again"
MOST_BYTES = 4096  # of the owner's file
RETRY_SECONDS = 0.2  # far below the second within which a rank takes two signals for one request


def rank(state: Path, command: list[str]) -> int:
    """Runs one rank; returns its exit status."""
    env = os.environ
    if "RANK" not in env:
        env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_NTASKS"], "LOCAL_RANK": env["SLURM_LOCALID"]}
        env["LOCAL_WORLD_SIZE"] = env["RANKS_PER_NODE"]
    me = f"{env['SLURM_JOB_ID']} {env.get('SLURM_RESTART_COUNT', '0')}"
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(received: int, _: object) -> None:
        if child is None:
            early.append(received)
        else:
            child.send_signal(received)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    child = subprocess.Popen(command)
    for received in early:
        child.send_signal(received)
    if "MEPA_PIDS" in env:
        (Path(env["MEPA_PIDS"]) / str(os.getpid())).touch()
    while True:
        try:
            code = child.wait(timeout=OWNER_CHECK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            owner = _read(state / "owner")
            if owner and owner != me:
                print(f"rank {env['RANK']}: the run now belongs to job and restart {owner!a}: killed", flush=True)
                child.kill()
    if code == -signal.SIGUSR1:
        code = REQUEUE_CODE
    code = code if code >= 0 else 128 - code
    if _read(state / "owner") == me:
        _write_anew(state / f"exit-{int(env['SLURM_JOB_ID'])}", str(int(env["RANK"])), f"{code}\n")
    return code


def torchrun(state: Path, command: list[str]) -> int:
    """Runs this node's ranks under torchrun; returns torchrun's exit status."""
    env = os.environ
    with tempfile.TemporaryDirectory(prefix="mepa-") as pids:
        options = [f"--nnodes={env['SLURM_NNODES']}", f"--nproc-per-node={env['RANKS_PER_NODE']}", "--max-restarts=0"]
        options += ["--rdzv-backend=c10d", f"--rdzv-endpoint={env['MASTER_ADDR']}:{env['MASTER_PORT']}"]
        options += [f"--rdzv-id={env['RENDEZVOUS_ID']}", f"--local-addr={env['SLURMD_NODENAME']}", "--no-python"]
        worker = [sys.executable, __file__, "rank", str(state), *command]
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *worker],
            env=env | {"MEPA_PIDS": pids, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"},
            preexec_fn=_ignore_stop_signals,
        )
        stop = False

        def note(*_: object) -> None:
            nonlocal stop
            stop = True

        for number in STOP_SIGNALS:
            signal.signal(number, note)
        told: set[str] = set()
        while True:
            try:
                return agent.wait(timeout=RETRY_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            if stop:  # again and again: ranks may still be starting
                for pid in set(os.listdir(pids)) - told:
                    _signal(int(pid))
                    told.add(pid)


def _ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGUSR1)
    except ProcessLookupError:  # that rank has ended already
        return


def _read(path: Path) -> str:
    """The text of a regular file; empty where there is none. A link is none, nor is what has no end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        return file.read(MOST_BYTES).decode(errors="replace").strip()


def _write_anew(directory: Path, name: str, text: str) -> None:
    """Writes a file of that name into a directory that is no link, in place of whatever has the name there."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o666, dir_fd=folder), "w") as file:
            file.write(text)
    finally:
        os.close(folder)


if __name__ == "__main__":
    sys.exit({"rank": rank, "torchrun": torchrun}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:]))
