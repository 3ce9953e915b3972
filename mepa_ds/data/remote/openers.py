"""The bytes at a URL, from the program that its scheme needs.

URLs are what webdataset opens (`https://`, `gs://`, `hf://`, `pipe:COMMAND`...) and `s3://`, which the AWS command line
fetches. A `pipe:` URL is a shell command: use no URL that you would not run as a program.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import IO

from mepa_ds.errors import UserError

_CHUNK = 1 << 20
_CURL = """
fail
silent
show-error
location
globoff
compressed
header = "Accept-Encoding: identity"
connect-timeout = 30
speed-limit = 1
speed-time = 60
"""
"""Servers are asked not to compress; what they compress anyway is unpacked. A stalled transfer is given up. No
--retry: curl would append the second attempt to what it has written already."""
_BY_CURL = ("http://", "https://", "ftp://", "ftps://", "sftp://", "scp://")
_BY_PROGRAM = {"s3://": ("aws", "s3", "cp", "--only-show-errors"), "gs://": ("gsutil", "-q", "cp")}


class StoppedError(Exception):
    """The program is ending: nobody waits for this file any more."""


def chunks_of(url: str, stop: threading.Event, complaints: list[str]) -> Generator[bytes, None, None]:
    """The bytes at a URL. If a command succeeds but writes to stderr, its last line is added to `complaints`."""
    program = next((words for scheme, words in _BY_PROGRAM.items() if url.startswith(scheme)), None)
    if url.startswith("pipe:"):
        yield from _output_of(url.removeprefix("pipe:"), stop, complaints)
    elif program is not None:
        yield from _output_of([*program, url, "-"], stop, complaints)
    elif url.startswith(_BY_CURL):  # by a file: everybody on a machine sees command lines
        if not url.isprintable():  # a new line would be read as an option
            raise ValueError("the address holds a control character")
        quoted = url.replace("\\", "\\\\").replace('"', '\\"')
        yield from _output_of(["curl", "--config", "-"], stop, complaints, f'{_CURL}url = "{quoted}"\n'.encode())
    else:
        from webdataset import gopen

        with gopen(url, "rb") as stream:
            while not stop.is_set() and (chunk := stream.read(_CHUNK)):
                yield chunk
    if stop.is_set():
        raise StoppedError


def _output_of(
    command: str | list[str], stop: threading.Event, complaints: list[str], told: bytes | None = None
) -> Iterator[bytes]:
    """What a command prints; a string is run by the shell. An error holds the last line that it wrote to stderr."""
    with tempfile.TemporaryFile() as said:
        process = _start(command, said, told)
        assert process.stdout is not None
        try:
            watch, descriptor = select.poll(), process.stdout.fileno()
            watch.register(descriptor, select.POLLIN)
            while not stop.is_set():
                if watch.poll(500):  # a command may be silent for long
                    if not (chunk := os.read(descriptor, _CHUNK)):
                        break
                    yield chunk
                elif process.poll() is not None:  # it has ended; a process forked meanwhile keeps the pipe open
                    break
            while process.poll() is None and not stop.is_set():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.stdout.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
        said.seek(max(said.seek(0, os.SEEK_END) - 4096, 0))
        lines = [line.strip() for line in said.read().decode(errors="replace").split("\n")]
        last = next((line for line in reversed(lines) if line), "")
    if process.returncode and not stop.is_set():
        raise OSError(last or f"its command ended with status {process.returncode}")
    complaints.extend([last] if last else [])


def _start(command: str | list[str], said: IO[bytes], told: bytes | None) -> subprocess.Popen[bytes]:
    read_from = subprocess.DEVNULL if told is None else subprocess.PIPE
    try:
        # In a session of its own: Ctrl-C does not reach the command, since this program may have to save first, and the
        # command can be ended together with all that it starts.
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=read_from,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: the program for such URLs is not installed here; install it") from error
    if process.stdin is not None and told is not None:
        with suppress(BrokenPipeError), process.stdin:  # a command that ended at once has said why
            process.stdin.write(told)
    return process
