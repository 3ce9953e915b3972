"""The bytes at a URL, from the program that its scheme needs.

Which schemes there are, and which of them a data directory may name, is in mepa_ds.data.remote.schemes. A `pipe:` URL
is a shell command: use no URL that you would not run as a program. What gives access (signatures, a token) reaches
curl on its standard input, since everybody on a machine sees command lines.
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
from pathlib import Path
from typing import IO, Any

from mepa_ds.data.remote.schemes import scheme_of
from mepa_ds.errors import UserError
from mepa_ds.safety.places import open_regular

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
max-redirs = 10
"""
"""Servers are asked not to compress; what they compress anyway is unpacked. A stalled transfer is given up. No
--retry: curl would append the second attempt to what it has written already."""
_BY_PROGRAM = {"s3": ("aws", "s3", "cp", "--only-show-errors"), "gs": ("gsutil", "-q", "cp")}


class StoppedError(Exception):
    """The program is ending: nobody waits for this file any more."""


def chunks_of(
    url: str, stop: threading.Event, complaints: list[str], most_bytes: int | None = None
) -> Generator[bytes, None, None]:
    """The bytes at a URL. If a command succeeds but writes to stderr, its last line is added to `complaints`.

    Args:
        most_bytes: a server that announces more is not read; who takes the bytes counts them nonetheless.

    Raises:
        ValueError: an address that is not opened (`scheme_of`).
        UserError: the program for it is not installed.
        StoppedError: `stop` was set.
    """
    scheme = scheme_of(url)
    if scheme == "pipe":
        yield from _output_of(url.removeprefix("pipe:"), stop, complaints)
    elif scheme in _BY_PROGRAM:
        yield from _output_of([*_BY_PROGRAM[scheme], url, "-"], stop, complaints)
    elif scheme == "file":
        yield from _content_of(Path(url.removeprefix("file://")), stop)
    else:
        address, token = _of_the_hub(url) if scheme == "hf" else (url, None)
        yield from _output_of(["curl", "--config", "-"], stop, complaints, _asks(address, token, most_bytes).encode())
    if stop.is_set():
        raise StoppedError


def _asks(url: str, token: str | None, most_bytes: int | None) -> str:
    """The configuration of curl that fetches a URL. Redirects stay with the web, and never leave TLS for plain text."""
    scheme = scheme_of(url)
    lines = [_CURL, f'url = "{_quoted(url)}"', f'proto = "={scheme}"']
    lines.append(f'proto-redir = "={"http,https" if scheme == "http" else "https"}"')
    if most_bytes is not None:
        lines.append(f"max-filesize = {most_bytes}")
    if token is not None:
        lines.append(f'header = "{_quoted(f"Authorization: Bearer {token}")}"')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Inside the quotes of curl's configuration. Raises ValueError for line breaks, which would begin an option."""
    if not text.isprintable():
        raise ValueError("a control character in an address or a token")
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _of_the_hub(url: str) -> tuple[str, str | None]:
    """The web address of an `hf://` URL, and the user's token, if there is one."""
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    place: Any = HfFileSystem().resolve_path(url)
    if not hasattr(place, "repo_id"):
        raise ValueError("it names no file of a repository on the Hub")
    address = hf_hub_url(
        repo_id=place.repo_id, filename=place.path_in_repo, repo_type=place.repo_type, revision=place.revision
    )
    return address, get_token()


def _content_of(path: Path, stop: threading.Event) -> Iterator[bytes]:
    with open(open_regular(path), "rb") as file:
        while not stop.is_set() and (chunk := file.read(_CHUNK)):
            yield chunk


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
