"""Output that cannot be written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mepa_ds import log


@contextmanager
def stream_to(descriptor: int, is_log: bool) -> Iterator[io.TextIOWrapper]:
    """As stdout is when a program has opened its streams."""
    stream = io.TextIOWrapper(io.BufferedWriter(log._Stream(descriptor, log.STDOUT, is_log)), encoding="utf-8")  # type: ignore[arg-type]
    yield stream
    stream.close()
    os.close(descriptor)


def test_a_full_disk_ends_no_work(capsys: pytest.CaptureFixture[str]) -> None:
    with stream_to(os.open("/dev/full", os.O_WRONLY), is_log=True) as stream:
        for _ in range(3):
            print("x" * 10_000, file=stream, flush=True)
    said = capsys.readouterr().err
    assert said == "warning: stdout cannot be written (No space left on device): lines are lost, and the work goes on\n"


def test_where_the_output_is_all_a_full_disk_is_an_error_once() -> None:
    with stream_to(os.open("/dev/full", os.O_WRONLY), is_log=False) as stream:
        with pytest.raises(OSError, match=r"No space left on device: 'stdout'"):
            print("a line", file=stream, flush=True)
        print("the interpreter's own attempt", file=stream, flush=True)


def test_a_reader_that_has_gone(capsys: pytest.CaptureFixture[str]) -> None:
    for is_log in (True, False):
        reader, writer = os.pipe()
        os.close(reader)
        with stream_to(writer, is_log) as stream:
            if is_log:
                print("a line", file=stream, flush=True)
            else:
                with pytest.raises(BrokenPipeError) as error:
                    print("a line", file=stream, flush=True)
                assert error.value.filename == log.STDOUT
    assert capsys.readouterr().err.count("Broken pipe") == 1


def test_a_reader_that_waits_holds_up_no_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And when it reads again it gets what is written then."""
    monkeypatch.setattr(log, "_PATIENCE_SECONDS", 0.05)
    reader, writer = os.pipe()
    with stream_to(writer, is_log=True) as stream:
        for _ in range(100):
            print("x" * 10_000, file=stream, flush=True)  # 16 times what the pipe holds
        assert capsys.readouterr().err.count("its reader has read nothing for 0.05 s") == 1
        while len(os.read(reader, 1 << 20)) == 1 << 16:
            pass
        print("the last line", file=stream, flush=True)
        assert os.read(reader, 1 << 20).endswith(b"the last line\n")
    os.close(reader)


@pytest.mark.parametrize("is_log", [True, False])
def test_a_slow_reader_of_a_non_blocking_pipe_gets_every_byte(is_log: bool) -> None:
    """Some parents make the pipe non-blocking, for all that share it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got = bytearray()

    def read() -> None:
        while chunk := os.read(reader, 1 << 14):
            got.extend(chunk)
            time.sleep(0.001)

    thread = threading.Thread(target=read)
    thread.start()
    with stream_to(writer, is_log) as stream:
        print("x" * 300_000, file=stream, flush=True)
    thread.join()
    os.close(reader)
    assert len(got) == 300_001


PROGRAM = """
import os, sys
from mepa_ds import log
log.open_streams()
log.make_stdout_a_log()
with open(sys.argv[1], "wb", buffering=0) as file:
    assert file.fileno() > 2
    print("\\u00e9t\\u00e9", flush=True)
    os.write(1, b"of a library in C")
    log.note("a note: \\u00e9")
    file.write(b"whole")
"""


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_parent_has_closed(closed: str, tmp_path: object) -> None:
    """Python has none then, and the next file that is opened would get what libraries print."""
    path = f"{tmp_path}/file"
    command = ["sh", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, PROGRAM, path]
    end = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (end.returncode, end.stdout) == (0, b""), end.stderr
    with open(path, "rb") as file:
        assert file.read() == b"whole"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_the_encoding_lacks_is_written_otherwise(unbuffered: str, tmp_path: object) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", PROGRAM, f"{tmp_path}/file"]
    end = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert (end.returncode, end.stdout) == (0, b"\\xe9t\\xe9\nof a library in C")
    assert end.stderr == b"a note: \\xe9\n"
