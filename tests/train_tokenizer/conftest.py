"""Training runs of tiny tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mepa_ds import distributed
from tests.train_tokenizer import training_run


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    yield
    distributed.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training_run.make_data(tmp_path)
    return tmp_path
