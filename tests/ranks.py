"""A training command on ranks that a test starts, signals and kills one by one, without a launcher in between."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from mepa_ds.runtime.metrics import read_metrics
from tests.forked import CONTEXT
from tests.tiny_run import free_port

Prepare = Callable[[], None] | None


def _run(arguments: list[str], environment: dict[str, str], log: Path, prepare: Prepare, command: str) -> None:
    from mepa_ds.command_line import entry

    main = importlib.import_module(f"mepa_ds.cli.{command}").main
    os.environ.update(environment)
    with open(log, "a") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    if prepare is not None:
        prepare()
    entry.run(lambda: main(arguments))


class Ranks:
    """The processes of one start of a run. Leaving the context kills what is left of them.

    `prepare`, a function of a module, is called in each of them first: the place to break something. `command`: a
    module of mepa_ds.cli.
    """

    def __init__(
        self, arguments: Sequence[str], count: int, log: Path, prepare: Prepare = None, command: str = "pretrain"
    ):
        self.log = log
        log.touch()
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        common |= {"LOCAL_WORLD_SIZE": str(count)}
        self.processes = []
        for rank in range(count):
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = CONTEXT.Process(target=_run, args=(list(arguments), own, log, prepare, command))
            process.daemon = True
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def signal(self, number: signal.Signals, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of all ranks, as a node that loses power."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Exit status of every rank; None for one that is still running after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        return [process.exitcode for process in self.processes]

    def check(self) -> None:
        """Raises when a rank has ended."""
        assert self.running, self.log.read_text()

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    return [str(folder / "recipe.yaml"), f"output_dir={folder / name}", *overrides]


def refused(folder: Path, name: str, *overrides: str, ranks: int = 1) -> str:
    """What starts say that must end with status 2."""
    log = folder / f"{Path(name).name}.refused"
    with Ranks(arguments(folder, name, *overrides), ranks, log) as started:
        assert started.wait() == [2] * ranks, log.read_text()
    assert "Traceback" not in log.read_text()
    return log.read_text()


def finish(arguments: Sequence[str], count: int, log: Path, command: str = "pretrain") -> str:
    """Runs to the end on `count` ranks; returns what was printed."""
    with Ranks(arguments, count, log, command=command) as ranks:
        assert ranks.wait() == [0] * count, log.read_text()
    return log.read_text()


def last_step(output_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    return max((r["step"] for r in read_metrics(output_dir / "metrics.jsonl") if r["event"] == "train"), default=0)


def wait_for_step(ranks: Ranks, output_dir: Path, step: int, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while last_step(output_dir) < step:
        ranks.check()
        assert time.monotonic() < end, f"step {step} not reached: {ranks.log.read_text()}"
        time.sleep(0.02)
