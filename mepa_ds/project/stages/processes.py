"""One process of a stage: started, watched, asked to end when this one is; its lines go above the progress bar."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from typing import IO

from mepa_ds.interrupts import Interrupted
from mepa_ds.project.stages.display import Display

_LINE = re.compile(rb"[^\r\n]*[\r\n]")


def run_python(command: str, display: Display, threads: int = 1) -> tuple[int, resource.struct_rusage]:
    """Runs Python with these words; its exit status, and what it and the processes that it started have used."""
    # Threads that wait by spinning slow everything down several times when other programs want the cores too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if command.startswith("-m torch.distributed.run"):  # torchrun would set one, and say so in five lines
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    pipe = subprocess.PIPE if display.has_bar else None
    words = [sys.executable, *shlex.split(command)]
    with subprocess.Popen(words, env=environment, stdout=pipe, stderr=subprocess.STDOUT if pipe else None) as process:
        reader = None
        if process.stdout is not None:
            reader = threading.Thread(target=_pass_on, args=(process.stdout, display), daemon=True)
            reader.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except Interrupted as interrupt:  # the command saves what it has; a terminal's Ctrl-C has reached it already
            if interrupt.number != signal.SIGINT or not sys.stdin.isatty():
                process.send_signal(interrupt.number)
            process.wait()
            raise
        else:
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:  # after an interrupt too: the last lines say what was saved
            if reader is not None:
                reader.join(timeout=5)
    return process.returncode, usage


def _pass_on(stream: IO[bytes], display: Display) -> None:
    """Prints whole lines; what ends in a carriage return is a state of a bar, and is replaced by the next one."""
    rest = b""
    while chunk := os.read(stream.fileno(), 1 << 16):
        rest += chunk
        end = 0
        for match in _LINE.finditer(rest):
            end = match.end()
            if match[0].endswith(b"\n") and match[0].strip():
                display.say(match[0].rstrip(b"\r\n").decode(errors="replace"))
        rest = rest[end:]
    if rest.strip():
        display.say(rest.decode(errors="replace"))


def run_quietly(command: str) -> tuple[int, resource.struct_rusage]:
    """Runs Python with these words, without what it prints to stdout; as `run_python` otherwise."""
    with subprocess.Popen([sys.executable, *shlex.split(command)], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage
