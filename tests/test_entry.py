"""How ranks end."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_run import launch

PROGRAM = """
import sys, time
from mepa_ds import distributed
from mepa_ds.cli import entry
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
