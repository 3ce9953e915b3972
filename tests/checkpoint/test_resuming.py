"""What a start does with what an earlier one, or another one, has left in output_dir."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.checkpoint import files as checkpoint_files
from mepa_ds.checkpoint.files import checkpoint_name, list_checkpoints
from mepa_ds.checkpoint.state import read_state
from mepa_ds.runtime import run_lock
from mepa_ds.runtime.metrics import read_metrics
from tests.ranks import Ranks, arguments, finish, last_step, refused, wait_for_step
from tests.tiny_run import make_run, make_sets

SETTINGS = ["log.checkpoint_every=4", "log.evaluate_every=4", "log.every=1", "optim.ema=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    make_run(folder, "train.steps=8", *SETTINGS)
    return folder


def test_two_starts_do_not_share_an_output(folder: Path) -> None:
    """The second is refused at once, and the first notices nothing."""
    log = folder / "first.log"
    with Ranks(arguments(folder, "shared", "train.steps=100000"), 2, log) as first:
        wait_for_step(first, folder / "shared", 4)
        message = refused(folder, "shared", "train.steps=100000", ranks=2)
        pid = first.processes[0].pid
        assert f"{folder}/shared: another start is at work there (process {pid} on " in message
        assert message.count("error: ") == 1
        assert json.loads((folder / "shared/status.json").read_text())["state"] == "running"
        wait_for_step(first, folder / "shared", last_step(folder / "shared") + 4)
    # A start that was killed holds nothing.
    finish(arguments(folder, "shared", f"train.steps={last_step(folder / 'shared') + 2}"), 2, folder / "shared.log")


def requeued() -> None:
    os.environ["SLURM_RESTART_COUNT"] = "1"


def requeued_and_impatient() -> None:
    requeued()
    run_lock._LOST_NODE_SECONDS = 1.5


def test_a_requeued_job_waits_for_a_lost_node(folder: Path) -> None:
    log, second = folder / "lost.log", folder / "requeued.log"
    with Ranks(arguments(folder, "lost", "train.steps=100000"), 1, log) as first:
        wait_for_step(first, folder / "lost", 2)
        with Ranks(arguments(folder, "lost", "train.steps=100000"), 1, second, requeued) as again:
            while "waiting for process" not in second.read_text():
                again.check()
                first.check()
                time.sleep(0.1)
            first.kill()
            wait_for_step(again, folder / "lost", last_step(folder / "lost") + 4)


def test_a_requeued_job_does_not_wait_for_ever(folder: Path) -> None:
    """A file server may keep the lock of a node that does not come back."""
    (folder / "kept").mkdir()
    with open(folder / "kept" / run_lock.LOCK_NAME, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert "at work there (an unknown process)" in refused(folder, "kept")
        log = folder / "kept.log"
        with Ranks(arguments(folder, "kept"), 2, log, requeued_and_impatient) as ranks:
            assert ranks.wait() == [0, 0], log.read_text()
    assert "warning: an unknown process still holds" in log.read_text()


def test_where_no_lock_can_be_had_nothing_is_locked(tmp_path: Path) -> None:
    (tmp_path / run_lock.LOCK_NAME).mkdir()
    lock = run_lock.RunLock(tmp_path)
    lock.take()
    assert not run_lock.is_held(tmp_path)
    lock.release()


def test_a_refused_start_leaves_no_directory(folder: Path) -> None:
    assert "nowhere: cannot read the weights" in refused(folder, "untouched", f"init_weights={folder}/nowhere")
    assert not (folder / "untouched").exists()


def test_the_length_in_epochs_keeps_its_batch(folder: Path) -> None:
    """With another one the number of steps would change when some of them are done."""
    length = ["train.steps=null", "train.epochs=2"]
    finish(arguments(folder, "epochs", *length, "train.global_batch=8"), 1, folder / "epochs.log")
    message = refused(folder, "epochs", *length, "train.global_batch=4")
    assert f"train.global_batch: 8 in {folder}/epochs/checkpoints/" in message
    assert "restore it, or give train.steps" in message
    text = finish(arguments(folder, "epochs", "train.steps=12", "train.global_batch=4"), 1, folder / "epochs2.log")
    assert "resumed from" in text


def test_a_resumed_run_does_without_its_initial_weights(folder: Path) -> None:
    finish(arguments(folder, "source"), 1, folder / "source.log")
    shutil.copytree(folder / "source/last", folder / "initial")
    weights = f"init_weights={folder / 'initial'}"
    finish(arguments(folder, "tuned", weights), 1, folder / "tuned.log")
    shutil.rmtree(folder / "initial")
    text = finish(arguments(folder, "tuned", weights, "train.steps=12"), 2, folder / "tuned2.log")
    assert "at step 8 of 12" in text
    assert "initial: cannot read" in refused(folder, "anew", weights)


def test_scores_on_other_heldout_tokens_are_not_compared(folder: Path) -> None:
    """A set that is harder would never have a best score again."""
    finish(arguments(folder, "scores"), 1, folder / "scores.log")
    before = read_state(folder / "scores/checkpoints" / checkpoint_name(8))
    maker = json.loads((folder / "heldout.tokens/index.json").read_text())["made_by"]["identity"]
    make_sets(folder, maker, count=16, seed=99, name="harder")
    other = f"data.heldout_tokens={folder / 'harder.tokens'}"
    finish(arguments(folder, "scores", other, "train.steps=12"), 1, folder / "scores2.log")
    records = list(read_metrics(folder / "scores/metrics.jsonl"))
    assert [r["message"] for r in records if r["event"] == "heldout_changed"] == [
        "data.heldout_tokens has changed, so the best score on the old held-out set no longer counts"
    ]
    heldout = [record for record in records if record["event"] == "heldout"]
    assert heldout[-1]["step"] == 12
    assert heldout[-1]["best"]
    after = read_state(folder / "scores/checkpoints" / checkpoint_name(12))
    assert before.heldout != after.heldout != ""
    assert after.best_heldout_ce == heldout[-1]["ce"]
    finish(arguments(folder, "scores", other, "train.steps=13"), 1, folder / "scores3.log")
    assert sum(r["event"] == "heldout_changed" for r in read_metrics(folder / "scores/metrics.jsonl")) == 1


def test_heldout_classes_are_those_of_training(folder: Path) -> None:
    """As many, but in another order: held-out scores would be wrong, and the best weights with them."""
    data = []
    for key, name, classes in (
        ("tokens", "train", ["cat", "dog", "fox"]),
        ("heldout_tokens", "heldout", ["Fox", "cat", "dog"]),
    ):
        named = folder / f"named_{name}.tokens"
        shutil.copytree(folder / f"{name}.tokens", named)
        index = json.loads((named / "index.json").read_text())
        (named / "index.json").write_text(json.dumps(index | {"classes": classes}))
        data.append(f"data.{key}={named}")
    message = refused(folder, "classes", *data)
    expected = "have different classes: label 0 is 'cat' in the first and 'Fox' in the second; make one of them again"
    assert expected in message
    finish(arguments(folder, "unnamed", data[1]), 1, folder / "unnamed.log")  # what has no names is not compared


def read_slowly() -> None:
    """Runs in each rank's process before the run: what one rank reads takes longer than hang_timeout, but moves."""
    read = checkpoint_files.sha256_of_file

    def slow(path: Path, on_chunk: Any = None) -> str:
        for _ in range(12 if path.name.endswith(".distcp") else 0):
            time.sleep(0.5)
            on_chunk(1)
        return read(path, on_chunk)

    checkpoint_files.sha256_of_file = slow


def test_the_watchdog_spares_ranks_that_wait_for_anothers_reading(folder: Path) -> None:
    """One rank wrote the checkpoint, so that of two one has nothing to read."""
    settings = ["data.heldout_tokens=null", "log.checkpoint_every=8"]
    finish(arguments(folder, "slow", *settings), 1, folder / "slow.log")
    assert len(list_checkpoints(folder / "slow/checkpoints")) == 1
    log = folder / "slow2.log"
    settings += ["train.steps=9", "guards.hang_timeout=4"]
    with Ranks(arguments(folder, "slow", *settings), 2, log, read_slowly) as ranks:
        assert ranks.wait() == [0, 0], log.read_text()
