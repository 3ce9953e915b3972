"""What users get wrong when they train a tokenizer."""

from __future__ import annotations

import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch

from mepa_ds.cli.train_tokenizer import main
from mepa_ds.errors import UserError
from mepa_ds.tokenizer.layers import Decoder
from tests.ranks import Ranks
from tests.tiny_run import launch
from tests.train_tokenizer import training_run as tiny


def test_the_number_of_ranks_must_divide_the_batch(folder: Path) -> None:
    config = tiny.config(folder, "train.accumulation=2")
    config.check_world(4)
    with pytest.raises(UserError, match=r"train\.global_batch \(8\) must be a multiple of 3 ranks x .* \(2\) = 6"):
        config.check_world(3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.comitment=1.0", r"loss\.comitment: unknown key; did you mean 'commitment'"),
        ("tokenizer.channels=48", "channels must be a multiple of 32"),
        ("tokenizer.scales=[1, 2, 2]", "sides must grow"),
        ("train.global_batch=10", "must be a multiple of 1 ranks x train.accumulation"),
        ("data.images=nowhere", r"data\.images: nowhere: no such directory"),
        ("data.heldout_images=nowhere", r"data\.heldout_images: nowhere: no such directory"),
        ("loss.adversarial={}", "needs images of at least 24 pixels, but the tokenizer makes 8; use fewer layers"),
        ("loss.adversarial.channels=48", "channels must be a multiple of 32"),
        ("codebook.usage_decay=1.0", r"codebook\.usage_decay: .*less than 1"),
        ("data.on_damaged=ignore", r"data\.on_damaged: .*'stop' or 'skip'"),
        ("codebook.dropout_from=3", r"dropout_from \(3\) must be below the number of scales \(3\)"),
        ("start_from=nowhere.pth", r"nowhere\.pth: cannot read the weights"),
        ("loss.perceptual={backbone_weights: nowhere.pth}", r"nowhere\.pth: cannot read the weights|pip install"),
    ],
)
def test_recipe(folder: Path, override: str, message: str) -> None:
    extra = ["train.accumulation=4"] if "global_batch" in override else []
    with pytest.raises(UserError, match=message):
        tiny.train(folder, override, *extra)
    assert not (folder / "run").exists()


def test_another_recipe_in_the_same_directory(folder: Path) -> None:
    tiny.train(folder)
    with pytest.raises(UserError, match=r"made by another recipe: codebook, train\.global_batch changed"):
        tiny.train(folder, "codebook.dropout=0.0", "train.global_batch=4")


def test_other_images_in_the_same_directory(folder: Path) -> None:
    tiny.train(folder)
    tiny.make_images(folder / "others", count=25)
    with pytest.raises(UserError, match=r"checkpoint\.pt was made from other images .*data\.images: .*others"):
        tiny.train(folder, f"data.images={folder / 'others'}", "train.steps=8")
    (folder / "images").rename(folder / "moved")  # where they lie does not matter
    tiny.train(folder, f"data.images={folder / 'moved'}", "train.steps=8")


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train_and_kill(folder, monkeypatch)
    before = (folder / "run" / "checkpoint.pt").read_bytes()
    healthy = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, f_hat: healthy(self, f_hat) * float("nan"))
    with pytest.raises(UserError, match="infinite or NaN before step 4; lower optim"):
        tiny.train(folder)
    assert (folder / "run" / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint(folder: Path) -> None:
    tiny.train(folder)
    path = folder / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"checkpoint\.pt: damaged, or not a file of torch\.save: its end is missing.*Remove it"
    ):
        tiny.train(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(2)}, "no step, position, tokenizer, .* in it"),
        ([1, 2], "a list"),
    ],
)
def test_a_foreign_checkpoint(folder: Path, content: object, message: str) -> None:
    (folder / "run").mkdir()
    torch.save(content, folder / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match=rf"checkpoint\.pt: not a checkpoint .*\({message}\); remove it"):
        tiny.train(folder)


@pytest.mark.slow
def test_exit_status_under_torchrun(folder: Path) -> None:
    script, path = tiny.write_script(folder), tiny.write_recipe(folder, "train.global_batch=9")
    result = launch([str(path)], ranks=2, script=script)
    assert result.returncode != 0
    assert result.stderr.count("error: train.global_batch (9) must be a multiple of 2 ranks") == 1
    assert "mepa_ds/train_tokenizer" not in result.stderr  # torchrun shows a traceback, but not ours


def test_the_help_has_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "codebook.revive_every" in text
    assert "loss.perceptual.backbone_weights" in text
    assert "optim.lr=" not in text


def test_ranks_that_do_not_share_an_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume would have rank 0 at the checkpoint's step and the others at the first."""
    tiny.train_and_kill(folder, monkeypatch)
    recipe, log = tiny.write_recipe(folder, "output_dir=run"), folder / "log"
    with Ranks([str(recipe)], 2, log, partial(work_apart, folder), "train_tokenizer") as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    assert log.read_text().count("does not see what rank 0 writes there") == 1
    assert not list(folder.glob("*/run/.probe*"))


def work_apart(folder: Path) -> None:
    """Runs in each rank's process before the run: its relative output_dir is another one on each rank."""
    own = folder if os.environ["RANK"] == "0" else folder / "b"
    own.mkdir(exist_ok=True)
    os.chdir(own)


def test_an_output_that_cannot_be_written(folder: Path) -> None:
    (folder / "a_file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: .*a_file/run: cannot write there: Not a directory; make room"):
        tiny.train(folder, f"output_dir={folder / 'a_file/run'}")


def test_a_disk_that_fills_up_in_the_middle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train_and_kill(folder, monkeypatch)
    checkpoint = folder / "run/checkpoint.pt"
    before = checkpoint.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, unlimited[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint\.pt: could not be written \(File too large\); make room and"):
            tiny.train(folder, "log.evaluate_every=100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert checkpoint.read_bytes() == before
    assert not list((folder / "run").glob("*.tmp"))
