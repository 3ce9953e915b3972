"""How tests are shared out when several processes run them (`pytest -n 2`, as `make test` does): file by file."""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).parent
# The longest first, so that processes end together. The SLURM cluster of tests/slurm comes last and in one process: it
# tells its nodes from dead ones by how fast they answer, so it should have the machine to itself.
ORDER = ("training", "test_quickstart.py", "engine", "test_pretraining.py", "tokenizer", "data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        top = item.path.relative_to(HERE).parts[0]
        return ORDER.index(top) if top in ORDER else len(ORDER) + (top == "slurm")

    items.sort(key=place)


class _ByFile(LoadScopeScheduling):
    """A process runs whole files, whose fixtures are then made once, and one runs all of tests/slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return _ByFile(config, log)
