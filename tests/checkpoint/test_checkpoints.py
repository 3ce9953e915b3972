"""Checkpoints under bad luck: damaged files, a full disk, other data, foreign files; and what is kept of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from mepa_ds import distributed
from mepa_ds.checkpoint import files as checkpoint_files
from mepa_ds.checkpoint import store as fragment_store
from mepa_ds.checkpoint.background_writer import BackgroundWriter
from mepa_ds.checkpoint.files import (
    checkpoint_name,
    clean,
    complete,
    digest,
    find_damage,
    list_checkpoints,
    prune,
    publish,
)
from mepa_ds.checkpoint.fragment import Fragment
from mepa_ds.checkpoint.state import RunState, read_state
from mepa_ds.checkpoint.store import load_fragments, read_tensors
from mepa_ds.checkpoint.weights import export_checkpoint, step_of_weights
from mepa_ds.cli import checkpoint as cli
from mepa_ds.config.base import load_config
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.training import TrainingBatch
from mepa_ds.errors import UserError
from mepa_ds.pretrain import checkpointing
from mepa_ds.pretrain.checkpointing import RunCheckpoints
from mepa_ds.pretrain.data import Loader
from mepa_ds.pretrain.start import prepared_output
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.weights.directories import read_state_dict
from tests.ranks import Ranks, arguments, finish, refused, wait_for_step
from tests.tiny_run import losses, make_run, make_sets, make_tokenizer

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and a finished run of one rank with checkpoints at steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = ["log.checkpoint_every=4", "log.keep_checkpoints=3", "log.evaluate_every=100", "optim.ema=0.5"]
    make_run(folder, f"train.steps={STEPS}", *settings)
    finish(arguments(folder, "whole"), 1, folder / "whole.log")
    return folder


def copy_of(folder: Path, name: str, *steps: int) -> list[Path]:
    """A new run `name` with the whole run's checkpoints of these steps."""
    paths = [folder / name / "checkpoints" / checkpoint_name(step) for step in steps]
    for path in paths:
        shutil.copytree(folder / "whole" / "checkpoints" / path.name, path)
    return paths


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(folder: Path) -> None:
    """Newest torn, the next with one flipped bit: the oldest is taken, and the run comes out the same."""
    _, middle, last = copy_of(folder, "damaged", 4, 8, 12)
    os.truncate(last / "__0_0.distcp", 1000)
    flip_bit(middle / "__0_0.distcp")
    log = finish(arguments(folder, "damaged"), 1, folder / "damaged.log")
    assert f"{last} is damaged (__0_0.distcp has 1000 bytes" in log
    assert f"{middle} is damaged (__0_0.distcp is not what was written (SHA-256))" in log
    assert "at step 4 of 12" in log
    assert losses(folder / "damaged") == losses(folder / "whole")[4:]
    assert (folder / "damaged/checkpoints" / f"{last.name}.damaged").is_dir()
    events = [record["event"] for record in read_metrics(folder / "damaged/metrics.jsonl")]
    assert events.count("damaged_checkpoint") == 2


def test_best_weights_that_were_not_copied_along_are_looked_for_anew(folder: Path) -> None:
    """By this start's first evaluation, here that of the finished run's last step; the link to them is replaced."""
    copy_of(folder, "branched", 12)
    best = folder / "branched/best"
    best.symlink_to(folder / "another_disk")
    log = finish(arguments(folder, "branched"), 1, folder / "branched.log")
    assert log.count(f"warning: {best} has no weights, though evaluations of this run had found its best ones") == 1
    assert f"warning: {best} was a link to {folder / 'another_disk'}" in log
    assert json.loads((best / "training.json").read_text()) == {"step": 12}
    ours, theirs = read_state_dict(best), read_state_dict(folder / "whole/best")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_byte_of_every_file_counts(folder: Path, tmp_path: Path) -> None:
    source = folder / "whole/checkpoints" / checkpoint_name(8)
    names = sorted(path.name for path in source.iterdir())
    assert names == [".metadata", "__0_0.distcp", "manifest.json", "run.json"]
    assert find_damage(source) is None
    for name in names:
        for spoil in (flip_bit, Path.unlink, lambda path: os.truncate(path, 3)):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(source, tmp_path / "copy")
            spoil(tmp_path / "copy" / name)
            assert find_damage(tmp_path / "copy") is not None, name


def test_what_is_no_checkpoint_is_not_called_damaged(folder: Path, tmp_path: Path) -> None:
    newest = folder / "whole/checkpoints" / checkpoint_name(12)
    with pytest.raises(UserError, match=rf"whole: no checkpoint .*; the newest of this run is {newest}$"):
        export_checkpoint(folder / "whole", tmp_path / "exported")
    with pytest.raises(UserError, match="no checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "exported")
    with pytest.raises(UserError, match="give at least one checkpoint, or the output_dir of a run"):
        cli.main(["verify"])
    assert not (tmp_path / "exported").exists()


def test_no_whole_checkpoint_is_an_error_not_a_new_start(folder: Path) -> None:
    """At every start: nothing is renamed, and no number is lost."""
    (only,) = copy_of(folder, "hopeless", 8)
    flip_bit(only / "run.json")
    metrics = folder / "hopeless/metrics.jsonl"
    metrics.write_text((folder / "whole/metrics.jsonl").read_text())
    for count in (1, 2):
        message = refused(folder, "hopeless", ranks=2)
        assert message.count("every checkpoint is damaged") == count, "once a start, not once a rank"
        assert message.count("restore one from a backup") == count
        assert only.is_dir()
        assert metrics.read_text() == (folder / "whole/metrics.jsonl").read_text()


def test_other_data_are_refused(folder: Path) -> None:
    copy_of(folder, "other", 8)
    make_sets(folder, make_tokenizer(folder / "tokenizer").identity, seed=5, name="other")
    sets = [f"data.tokens={folder}/other.tokens", f"data.features={folder}/other.features"]
    message = refused(folder, "other", *sets, ranks=2)
    assert message.count("was trained on other data (data.features: '40 samples by random, ") == 1
    assert "data.tokens: '40 samples by tiny, " in message
    assert "restore the data, or choose another output_dir" in message
    assert "seed: '0' there, '1' now" in refused(folder, "other", "seed=1")
    shutil.copytree(folder / "train.tokens", folder / "elsewhere.tokens")
    finish(arguments(folder, "other", f"data.tokens={folder}/elsewhere.tokens"), 1, folder / "moved.log")
    assert losses(folder / "other") == losses(folder / "whole")[8:]


def test_another_projector_is_refused(folder: Path) -> None:
    copy_of(folder, "projector", 8)
    message = refused(folder, "projector", "objective.alignment.projector_hidden=64", ranks=2)
    assert message.count("objective.alignment.projector_hidden: 32 there, 64 now") == 1


def test_a_checkpoint_from_before_a_key_of_the_model_existed_is_its_default(folder: Path) -> None:
    (path,) = copy_of(folder, "older", 8)
    rewrite_state(path, lambda state: state["recipe"]["model"].pop("class_dropout"))
    finish(arguments(folder, "older"), 1, folder / "older.log")
    assert losses(folder / "older") == losses(folder / "whole")[8:]
    message = refused(folder, "older", "model.class_dropout=0.3")
    assert "model.class_dropout: 0.1 there, 0.3 now" in message


def rewrite_state(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes run.json, and the manifest with it."""
    state = json.loads((checkpoint / "run.json").read_text())
    edit(state)
    (checkpoint / "run.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["run.json"] = digest(checkpoint / "run.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def lose_a_file_while_loading() -> None:
    """Runs in each rank's process before the run: the file system fails after the digests were compared."""
    from mepa_ds.checkpoint.store import _Reader

    def read_data(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    _Reader.read_data = read_data  # type: ignore[assignment]


def test_an_error_while_loading_is_told_once(folder: Path) -> None:
    copy_of(folder, "unreadable", 8)
    log = folder / "unreadable.log"
    with Ranks(arguments(folder, "unreadable"), 2, log, lose_a_file_while_loading) as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    assert log.read_text().count("cannot be read: rank 0: [Errno 5] Input/output error") == 1, log.read_text()
    assert "Traceback" not in log.read_text()


def test_other_tensors_than_the_checkpoints_are_a_user_error(folder: Path) -> None:
    path = folder / "whole/checkpoints" / checkpoint_name(8)
    wrong = Fragment("master/transformer.head.bias", 5, 0, torch.empty(5))
    with pytest.raises(UserError, match=r"the checkpoint has 16 elements of master/transformer\.head\.bias"):
        load_fragments([wrong], path, alone=True)


def test_a_passing_error_of_the_file_system_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "whole/checkpoints" / checkpoint_name(8)
    failures = [OSError(5, "Input/output error")]
    original = checkpoint_files.sha256_of_file

    def flaky(*values: Any) -> str:
        if failures:
            raise failures.pop()
        return original(*values)

    monkeypatch.setattr(checkpoint_files, "sha256_of_file", flaky)
    monkeypatch.setattr(checkpoint_files, "_RETRY_SECONDS", 0)
    assert find_damage(path) is None
    failures += [OSError(5, "Input/output error")] * 2
    assert find_damage(path) == "OSError: [Errno 5] Input/output error"


def test_a_longer_run_exports_its_own_last_weights(folder: Path) -> None:
    output = folder / "longer"
    for steps in (5, 10):
        finish(arguments(folder, "longer", f"train.steps={steps}"), 2, folder / "longer.log")
        exported = read_state_dict(output / "last")["head.weight"]
        stored = read_tensors(output / "checkpoints" / checkpoint_name(steps), ["master/transformer.head.weight"])
        assert exported.equal(stored["master/transformer.head.weight"].view(exported.shape)), steps
        assert step_of_weights(output / "last") == steps
        assert step_of_weights(output / "last_ema") == steps


def die_before_the_last_weights() -> None:
    """Runs in each rank's process before the run."""
    RunCheckpoints.export_last = lambda checkpoints, step: os._exit(9)  # type: ignore[assignment]


def test_steps_that_are_taken_again_export_their_own_last_weights(folder: Path) -> None:
    """Finished at 12, whose checkpoint is damaged: taken again from 8 at another rate, and killed once."""
    for name, dies in (("again", False), ("again_killed", True)):
        damaged = copy_of(folder, name, 4, 8, 12)[-1]
        flip_bit(damaged / "__0_0.distcp")
        output, log = folder / name, folder / f"{name}.log"
        for exported in ("last", "last_ema"):
            shutil.copytree(folder / "whole" / exported, output / exported)
        words = arguments(folder, name, "optim.base_lr=0.2")
        if dies:
            with Ranks(words, 1, log, die_before_the_last_weights) as ranks:
                assert ranks.wait() == [9], log.read_text()
        finish(words, 1, log)
        for exported, kind in (("last", "master"), ("last_ema", "ema")):
            head = f"{kind}/transformer.head.weight"
            stored = read_tensors(damaged, [head])[head]
            assert read_state_dict(output / exported)["head.weight"].flatten().equal(stored), (name, exported)
            assert not read_state_dict(folder / "whole" / exported)["head.weight"].flatten().equal(stored)


def fail_in_step_2_while_a_checkpoint_is_written() -> None:
    """Runs in each rank's process before the run: rank 1 meets a damaged sample in step 2, and writes only then."""
    if distributed.read_launch().rank != 1:
        return
    write, following, calls, met = filesystem._write_item, Loader.__next__, [], Event()

    def slow_write(*arguments: Any) -> Any:
        assert met.wait(200)
        return write(*arguments)

    def fail(loader: Loader) -> TrainingBatch:
        calls.append(loader)
        if len(calls) == 2:
            met.set()
            raise UserError("shard-7.tar: sample 9 is damaged")
        return following(loader)

    filesystem._write_item = slow_write  # type: ignore[assignment]
    Loader.__next__ = fail  # type: ignore[assignment]


def test_an_error_that_all_ranks_share_lets_the_checkpoint_be_finished(folder: Path) -> None:
    log = folder / "agreed.log"
    words = arguments(folder, "agreed", "log.checkpoint_every=1")
    with Ranks(words, 2, log, fail_in_step_2_while_a_checkpoint_is_written) as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    assert log.read_text().count("error: rank 1: shard-7.tar: sample 9 is damaged") == 1
    (path,) = list_checkpoints(folder / "agreed/checkpoints")
    assert path.name == checkpoint_name(1)
    assert find_damage(path) is None


def test_the_best_weights_of_a_checkpointed_step_cost_no_second_wait(folder: Path) -> None:
    """One job writes both, from the same copy; the checkpoint knows its weights as the best ones."""
    settings = ["log.evaluate_every=4", "train.steps=4"]
    finish(arguments(folder, "best", *settings), 2, folder / "best.log")
    output = folder / "best"
    path = output / "checkpoints" / checkpoint_name(4)
    records = list(read_metrics(output / "metrics.jsonl"))
    written = {record["what"]: record for record in records if record["event"] == "written"}
    assert list(written) == ["best", checkpoint_name(4), "last", "last_ema"]
    assert written["best"]["stalled_seconds"] == 0
    assert read_state_dict(output / "best")["head.bias"].equal(
        read_tensors(path, ["master/transformer.head.bias"])["master/transformer.head.bias"]
    )
    (heldout,) = [record["ce"] for record in records if record["event"] == "heldout"]
    assert read_state(path).best_heldout_ce == heldout
    assert read_state(path).evaluated_step == 4


def fail_to_write_the_best_weights_of_step_4() -> None:
    """Runs in each rank's process before the run."""
    original = checkpointing.convert_fragments

    def convert(
        fragments: Path, config: ModelConfig, directory: Path, kind: str, step: int, class_names: Sequence[str]
    ) -> None:
        if step == 4:
            raise OSError(28, "No space left on device")
        original(fragments, config, directory, kind, step, class_names)

    checkpointing.convert_fragments = convert


@pytest.mark.parametrize("checkpoint_every", [4, 3])
def test_weights_are_the_best_only_when_they_are_on_disk(folder: Path, checkpoint_every: int) -> None:
    """Those of step 4 could not be written, together with its checkpoint or alone."""
    name = f"not_best{checkpoint_every}"
    settings = ["log.evaluate_every=4", "train.steps=8", f"log.checkpoint_every={checkpoint_every}"]
    log = folder / f"{name}.log"
    with Ranks(arguments(folder, name, *settings), 2, log, fail_to_write_the_best_weights_of_step_4) as ranks:
        assert ranks.wait() == [0, 0], log.read_text()
    assert "best could not be written (OSError: [Errno 28] No space left on device)" in log.read_text()
    records = list(read_metrics(folder / name / "metrics.jsonl"))
    first, second = [record["ce"] for record in records if record["event"] == "heldout"]
    states = {path.name: read_state(path) for path in list_checkpoints(folder / name / "checkpoints")}
    assert states[checkpoint_name(4 if checkpoint_every == 4 else 6)].best_heldout_ce == float("inf")
    assert states[checkpoint_name(8)].best_heldout_ce == second < first
    assert step_of_weights(folder / name / "best") == 8


def test_files_of_ranks_that_are_not_there_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"123")
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(OSError, match=r"__1_0.distcp was written by a rank, but is not there: output_dir must be"):
        complete(tmp_path, RunState(), {n: {"bytes": 3, "sha256": ""} for n in ("__0_0.distcp", "__1_0.distcp")})
    assert not (tmp_path / "manifest.json").exists()


def leave_for_another_directory() -> None:
    """Runs in each rank's process before the run: a relative output_dir is then another one on rank 1."""
    if distributed.read_launch().rank == 1:
        os.chdir("tests/checkpoint")


def test_an_output_that_not_all_nodes_share_is_refused(folder: Path) -> None:
    log = folder / "not_shared.log"
    output = os.path.relpath(folder / "not_shared")  # forked ranks start where the tests run
    with Ranks([str(folder / "recipe.yaml"), f"output_dir={output}"], 2, log, leave_for_another_directory) as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    assert log.read_text().count("does not see what rank 0 writes there") == 1, log.read_text()
    assert "it must lie on a file system that all nodes share" in log.read_text()
    assert not list((folder / "not_shared").glob(".probe*"))


def limit_files(ranks: Ranks, rank: int, size: int) -> Callable[[], object]:
    """No file of that rank may grow beyond `size` bytes, until the result is called."""
    pid = ranks.processes[rank].pid
    assert pid is not None
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))
    return lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


def test_a_full_disk_elsewhere_does_not_end_the_run_either(folder: Path) -> None:
    """Rank 0 may write no more than 4 kB a file from step 4 on: metrics, pictures, checkpoints (but its log)."""
    settings = ["train.steps=100000", "log.every=4", "log.sample_every=4", "log.evaluate_every=100000"]
    output = folder / "full0"
    log = folder / "full0.log"
    with Ranks(arguments(folder, "full0", *settings), 2, log) as ranks:
        wait_for_event(ranks, output, "samples")
        lift = limit_files(ranks, 0, 4000)
        while "a picture could not be written" not in log.read_text():
            assert ranks.running, log.read_text()
            time.sleep(0.05)
        lift()
        failed = wait_for_event(ranks, output, "write_failed")
        wait_for_step(ranks, output, int(str(failed["step"])) + 4)
    assert log.read_text().count("metrics.jsonl cannot be written ([Errno 27] File too large)") == 1
    steps = [record["step"] for record in read_metrics(output / "metrics.jsonl") if record["event"] == "train"]
    assert steps == list(range(4, 4 * len(steps) + 1, 4)), "no record is lost"


def test_a_stop_without_a_checkpoint_says_where_the_run_goes_on(folder: Path) -> None:
    settings = ["train.steps=100000", "log.checkpoint_every=4"]
    output = folder / "stopped_full"
    log = folder / "stopped_full.log"
    with Ranks(arguments(folder, "stopped_full", *settings), 2, log) as ranks:
        wait_for_event(ranks, output, "written")
        limit_files(ranks, 1, 1)
        wait_for_event(ranks, output, "write_failed")
        newest = list_checkpoints(output / "checkpoints")[-1]
        ranks.signal(signal.SIGUSR1, 0)
        assert ranks.wait() == [75, 75], log.read_text()
    step = checkpoint_files.step_of(newest)
    assert f"start again to go on from step {step}, the last checkpoint (the checkpoint of this step could not be" in (
        log.read_text()
    )


def test_a_full_disk_does_not_end_the_run(folder: Path) -> None:
    """Files may not grow beyond 100 kB from step 5 on, and may again from step 9 on."""
    settings = ["train.steps=100000", "log.checkpoint_every=4", "log.keep_checkpoints=1", "log.every=4"]
    output = folder / "full"
    with Ranks(arguments(folder, "full", *settings), 2, folder / "full.log") as ranks:
        wait_for_step(ranks, output, 4)
        while not list_checkpoints(output / "checkpoints"):
            ranks.check()
            time.sleep(0.01)
        lift = limit_files(ranks, 1, 100_000)
        failed = wait_for_event(ranks, output, "write_failed")
        assert "rank 1: OSError: [Errno 27] File too large" in failed["message"]
        assert list_checkpoints(output / "checkpoints"), "the old checkpoint is gone"
        lift()
        written = wait_for_event(ranks, output, "written", after=failed["step"])
    assert written["what"] > checkpoint_name(failed["step"])
    assert find_damage(list_checkpoints(output / "checkpoints")[-1]) is None
    assert "could not be written" in ranks.log.read_text()


def forbid_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_weights_that_cannot_be_written_at_the_end_are_an_error(folder: Path) -> None:
    settings = ["train.steps=3", "log.every=3"]
    log = folder / "no_room.log"
    with Ranks(arguments(folder, "no_room", *settings), 2, log, prepare=forbid_large_files) as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    assert f"error: {folder}/no_room/last: could not be written (rank 0: OSError: [Errno 27]" in log.read_text()
    assert json.loads((folder / "no_room/status.json").read_text())["state"] == "failed"
    finish(arguments(folder, "no_room", *settings), 2, log)
    assert (folder / "no_room/last/model.safetensors").exists()


def wait_for_event(ranks: Ranks, output: Path, event: str, after: int = 0) -> dict[str, Any]:
    while True:
        ranks.check()
        time.sleep(0.01)
        for record in read_metrics(output / "metrics.jsonl"):
            if record["event"] == event and record["step"] > after:
                return record


def test_an_output_that_cannot_be_written_is_refused_before_training(folder: Path) -> None:
    blocked = folder / "a_file"
    blocked.write_text("")
    message = refused(folder, "a_file/run")
    assert f"output_dir: {blocked}/run: cannot write there: Not a directory" in message


def test_a_disk_that_is_full_is_found_before_training(folder: Path) -> None:
    config = load_config(PretrainConfig, folder / "recipe.yaml", [f"output_dir={folder / 'full_before'}"])
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        message = r"full_before: cannot write there: .*; make room, or choose another one"
        with pytest.raises(UserError, match=message), prepared_output(config.output_dir, config.log):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list((folder / "full_before").iterdir())


def test_old_checkpoints_go_and_milestones_stay(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        (tmp_path / checkpoint_name(step)).mkdir()
    (tmp_path / f"{checkpoint_name(14)}.damaged").mkdir()
    prune(tmp_path, keep=2, keep_every=4, keep_steps=(2,))
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (2, 4, 8, 10, 12)]
    (tmp_path / f".{checkpoint_name(4)}.pruned/rest").mkdir(parents=True)
    prune(tmp_path, keep=1, keep_every=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(12)]


def test_half_written_and_half_deleted_directories_are_never_checkpoints(tmp_path: Path) -> None:
    for name in (".step_00000004.tmp", ".step_00000002.pruned"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    (tmp_path / ".step_00000004.tmp" / "new").write_text("")
    (tmp_path / checkpoint_name(4)).mkdir()
    publish(tmp_path / ".step_00000004.tmp", tmp_path / checkpoint_name(4))
    assert [path.name for path in (tmp_path / checkpoint_name(4)).iterdir()] == ["new"]
    names = [".last.old", ".best.old", "best", ".step_00000004.old", ".step_00000006.old", ".step_00000008.pruned"]
    for name in (*names, ".venv.old", ".config.tmp"):
        (tmp_path / name).mkdir()
    clean(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".config.tmp", ".venv.old", "best", "last", checkpoint_name(4), checkpoint_name(6)], (
        "only ours; what was to be replaced is back, what was to be deleted is gone"
    )


def write_slowly() -> None:
    """Runs in each rank's process before the run: rank 1 takes its time to write, rank 0 to export."""
    write, look_up = filesystem._write_item, fragment_store._LoadPlanner.lookup_tensor
    rank = distributed.read_launch().rank

    def slow_write(*arguments: Any) -> Any:
        time.sleep(0.08 if rank == 1 else 0)
        return write(*arguments)

    def slow_look_up(*arguments: Any) -> torch.Tensor:
        time.sleep(0.12 if rank == 0 else 0)
        return look_up(*arguments)

    filesystem._write_item = slow_write  # type: ignore[assignment]
    fragment_store._LoadPlanner.lookup_tensor = slow_look_up  # type: ignore[assignment]


def test_the_watchdog_spares_what_is_slow_but_moves(folder: Path) -> None:
    """Each phase takes longer than hang_timeout, on one rank only: the other waits for it, and is not stuck either."""
    settings = ["train.steps=1", "guards.hang_timeout=4", "data.heldout_tokens=null", "optim.ema=null"]
    log = folder / "slow.log"
    with Ranks(arguments(folder, "slow", *settings), 2, log, write_slowly) as ranks:
        assert ranks.wait() == [0, 0], log.read_text()
    written = [r for r in read_metrics(folder / "slow/metrics.jsonl") if r["event"] == "written"]
    assert [record["what"] for record in written] == [checkpoint_name(1), "last"]
    assert all(record["write_seconds"] > 4 for record in written)


def test_what_is_on_the_cpu_is_written_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP's loader for GPUs would use the current one, in our thread the first: another rank's."""

    def touched(*arguments: Any) -> None:
        raise AssertionError("a GPU is used")

    current: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", touched)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append((device, current_thread().name)))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        writer = BackgroundWriter(torch.device("cuda", 1))
        fragment = Fragment("master/a", 5, 0, torch.arange(5.0))
        writer.submit("a", lambda: [fragment], tmp_path / "a", lambda digests: None)
        writer.wait()
    finally:
        dist.destroy_process_group()
    assert [written.error for written in writer.written()] == [None]
    assert read_tensors(tmp_path / "a", ["master/a"])["master/a"].tolist() == [0, 1, 2, 3, 4]
    assert current == [(torch.device("cuda", 1), "checkpoint")]


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def test_a_foreign_table_of_contents_runs_no_code(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "whole/checkpoints" / checkpoint_name(8), tmp_path / "copy")
    (tmp_path / "copy/.metadata").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(UserError, match=r"posix\.system does not belong into a checkpoint"):
        read_tensors(tmp_path / "copy", ["master/transformer.head.bias"])


def test_the_average_is_that_of_the_masters(folder: Path) -> None:
    """ema_12 = 2^-4 ema_8 + ... cannot be seen from checkpoints alone, but with one step between them it can."""
    path = copy_of(folder, "average", 8)[0]
    finish(arguments(folder, "average", "log.checkpoint_every=1", "log.keep_checkpoints=9"), 1, folder / "average.log")
    following = path.with_name(checkpoint_name(9))
    name = "transformer.head.weight"
    before, after = (read_tensors(p, [f"ema/{name}", f"master/{name}"]) for p in (path, following))
    expected = 0.5 * before[f"ema/{name}"] + 0.5 * after[f"master/{name}"]
    torch.testing.assert_close(after[f"ema/{name}"], expected, atol=1e-7, rtol=1e-6)
    last = read_state_dict(folder / "average/last_ema")["head.weight"]
    assert last.equal(
        read_tensors(path.with_name(checkpoint_name(12)), [f"ema/{name}"])[f"ema/{name}"].view(last.shape)
    )


def test_the_average_can_be_turned_on_later(folder: Path) -> None:
    finish(arguments(folder, "no_average", "optim.ema=null", "train.steps=4"), 1, folder / "no_average.log")
    assert not (folder / "no_average/last_ema").exists()
    finish(arguments(folder, "no_average"), 1, folder / "no_average.log")
    assert (folder / "no_average/last_ema/model.safetensors").exists()


def test_the_command_lists_verifies_and_compares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "whole"
    first, second = (run / "checkpoints" / checkpoint_name(step) for step in (4, 8))
    cli.main(["ls", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[checkpoint_name(s), str(8 * s)] for s in (4, 8, 12)]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["verify", str(run)])
    assert capsys.readouterr().out.count(": whole") == 3
    (broken,) = copy_of(folder, "broken", 4)
    flip_bit(broken / "run.json")
    with pytest.raises(SystemExit, match="1"):
        cli.main(["verify", str(broken)])
    assert "DAMAGED: run.json is not what was written" in capsys.readouterr().out
    (broken / "run.json").unlink()
    with pytest.raises(SystemExit, match="1"):
        cli.main(["verify", str(broken)])
    assert "DAMAGED: FileNotFoundError" in capsys.readouterr().out
    copy_of(folder, "broken", 8)
    cli.main(["ls", str(folder / "broken")])
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()] == [
        ["DAMAGED:", "run.json"],
        ["64", "images"],
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["diff", str(first), str(first)])
    assert capsys.readouterr().out == "no difference\n"
    with pytest.raises(SystemExit, match="1"):
        cli.main(["diff", str(first), str(second)])
    assert "position: 32 -> 64" in capsys.readouterr().out
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        cli.main(["ls", str(folder)])


def test_a_checkpoint_says_what_wrote_it(folder: Path) -> None:
    state = read_state(folder / "whole/checkpoints" / checkpoint_name(8))
    assert state.versions["torch"] == importlib.metadata.version("torch")
    assert state.recipe["optim"]["ema"] == 0.5
    assert state.data["seed"] == "0"
