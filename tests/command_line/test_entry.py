"""How ranks end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import launch

PROGRAM = """
import sys, time
from mepa_ds import distributed
from mepa_ds.command_line import entry
entry._LEAVE_SECONDS = 0.2
def main():
    distributed.start(distributed.read_launch())
    if distributed.is_main():
        time.sleep(2)
        print("the last word")
    sys.exit(int(sys.argv[1]))
entry.run(main)
"""


def test_ranks_wait_for_the_one_that_has_more_to_do(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = launch(["0"], ranks=2, script=program)
    assert result.returncode == 0, result.stderr
    assert "the last word" in result.stdout
    assert "does not end" not in result.stderr
    assert launch(["3"], ranks=2, script=program).returncode != 0


def test_a_node_that_lacks_a_file_says_so() -> None:
    """Before the ranks meet; its other ranks are silent, and so are other ranks of the first node."""
    program = "from mepa_ds.command_line import entry; from mepa_ds import UserError\n"
    program += "def main(): raise UserError('recipe.yaml: not here')\nentry.run(main)"

    def says(rank: int, local_rank: int) -> tuple[int, str]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "16"}
        command = [sys.executable, "-c", program]
        end = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=60, check=False)
        return end.returncode, end.stderr

    assert says(0, 0) == says(8, 0) == (2, "error: recipe.yaml: not here\n")
    assert says(1, 1) == says(9, 1) == (2, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["print('a line')", "sys.exit(print('help'))", "print('x' * 100000)"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(words: str, unbuffered: str) -> None:
    """`mepa report RUN | head -1`: the status is that of other tools, which SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    program = f"import sys; from mepa_ds.command_line import entry; entry.run(lambda: {words})"
    command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    try:
        result = subprocess.run(
            command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("OSError(28, 'No space left on device', 'out/x.png')", "out/x.png: No space left on device; free some space"),
        ("PermissionError(13, 'Permission denied', 'out')", "out: Permission denied; give another path"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_message(error: str, says: str) -> None:
    program = f"from mepa_ds.command_line import entry\ndef main(): raise {error}\nentry.run(main)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {says}")


def test_a_connection_of_the_network_that_breaks_is_no_reader_that_has_gone() -> None:
    program = """
from mepa_ds.command_line import entry
def main():
    raise BrokenPipeError(32, "of a socket")
entry.run(main)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1
    assert "BrokenPipeError: [Errno 32] of a socket" in result.stderr
