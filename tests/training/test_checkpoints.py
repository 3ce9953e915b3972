"""Checkpoints under bad luck: damaged files, a full disk, other data, foreign files; and what is kept of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch

from mepa_ds.cli import checkpoint as cli
from mepa_ds.engine.checkpoint_files import (
    checkpoint_name,
    clean,
    find_damage,
    list_checkpoints,
    prune,
    publish,
    read_state,
)
from mepa_ds.engine.fragment_store import read_tensors
from mepa_ds.errors import UserError
from mepa_ds.metrics import read_metrics
from mepa_ds.weights import read_state_dict
from tests.tiny_run import losses, make_run, make_sets, make_tokenizer
from tests.training.ranks import Ranks, finish, wait_for_step

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and a finished run of one rank with checkpoints at steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = ["log.checkpoint_every=4", "log.keep_checkpoints=3", "log.evaluate_every=100", "optim.ema=0.5"]
    make_run(folder, f"train.steps={STEPS}", *settings)
    finish(arguments(folder, "whole"), 1, folder / "whole.log")
    return folder


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    return [str(folder / "recipe.yaml"), f"output_dir={folder / name}", *overrides]


def copy_of(folder: Path, name: str, *steps: int) -> list[Path]:
    """A new run `name` with the whole run's checkpoints of these steps."""
    paths = [folder / name / "checkpoints" / checkpoint_name(step) for step in steps]
    for path in paths:
        shutil.copytree(folder / "whole" / "checkpoints" / path.name, path)
    return paths


def refused(folder: Path, name: str, *overrides: str) -> str:
    """What a start says that must end with status 2."""
    log = folder / f"{Path(name).name}.refused"
    with Ranks(arguments(folder, name, *overrides), 1, log) as ranks:
        assert ranks.wait() == [2], log.read_text()
    return log.read_text()


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


def test_no_whole_checkpoint_is_an_error_not_a_new_start(folder: Path) -> None:
    (only,) = copy_of(folder, "hopeless", 8)
    flip_bit(only / "run.json")
    message = refused(folder, "hopeless")
    assert "every checkpoint is damaged" in message
    assert "restore one from a backup" in message


def test_other_data_are_refused(folder: Path) -> None:
    copy_of(folder, "other", 8)
    make_sets(folder, make_tokenizer(folder / "tokenizer").identity, seed=5, name="other")
    sets = [f"data.tokens={folder}/other.tokens", f"data.features={folder}/other.features"]
    message = refused(folder, "other", *sets)
    assert "was trained on other data (data.features: '40 samples by random, " in message
    assert "data.tokens: '40 samples by tiny, " in message
    assert "restore the data, or choose another output_dir" in message
    assert "seed: '0' there, '1' now" in refused(folder, "other", "seed=1")
    shutil.copytree(folder / "train.tokens", folder / "elsewhere.tokens")
    finish(arguments(folder, "other", f"data.tokens={folder}/elsewhere.tokens"), 1, folder / "moved.log")
    assert losses(folder / "other") == losses(folder / "whole")[8:]


def test_a_full_disk_does_not_end_the_run(folder: Path) -> None:
    """Files may not grow beyond 100 kB from step 5 on, and may again from step 9 on."""
    settings = ["train.steps=100000", "log.checkpoint_every=4", "log.keep_checkpoints=1", "log.every=4"]
    output = folder / "full"
    with Ranks(arguments(folder, "full", *settings), 2, folder / "full.log") as ranks:
        wait_for_step(ranks, output, 4)
        while not list_checkpoints(output / "checkpoints"):
            assert ranks.running, ranks.log.read_text()
        pid = ranks.processes[1].pid
        assert pid is not None
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        failed = wait_for_event(ranks, output, "write_failed")
        assert "rank 1: OSError: [Errno 27] File too large" in failed["message"]
        assert list_checkpoints(output / "checkpoints"), "the old checkpoint is gone"
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
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


def wait_for_event(ranks: Ranks, output: Path, event: str, after: int = 0) -> dict[str, object]:
    while True:
        assert ranks.running, ranks.log.read_text()
        for record in read_metrics(output / "metrics.jsonl"):
            if record["event"] == event and record["step"] > after:
                return record


def test_an_output_that_cannot_be_written_is_refused_before_training(folder: Path) -> None:
    blocked = folder / "a_file"
    blocked.write_text("")
    message = refused(folder, "a_file/run")
    assert f"output_dir: {blocked}/run: cannot write there: Not a directory" in message


def test_old_checkpoints_go_and_milestones_stay(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        (tmp_path / checkpoint_name(step)).mkdir()
    (tmp_path / f"{checkpoint_name(14)}.damaged").mkdir()
    prune(tmp_path, keep=2, keep_every=4)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (4, 8, 10, 12)]
    prune(tmp_path, keep=1, keep_every=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(12)]


def test_half_written_and_half_deleted_directories_are_never_checkpoints(tmp_path: Path) -> None:
    for name in (".step_00000004.tmp", ".step_00000002.old"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    (tmp_path / ".step_00000004.tmp" / "new").write_text("")
    (tmp_path / checkpoint_name(4)).mkdir()
    publish(tmp_path / ".step_00000004.tmp", tmp_path / checkpoint_name(4))
    assert [path.name for path in (tmp_path / checkpoint_name(4)).iterdir()] == ["new"]
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(4)]


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
