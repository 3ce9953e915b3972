"""The tokenizer's training: resume, ranks, micro-batches, and what users get wrong."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.train_tokenizer.loop import _start_from, train_tokenizer
from mepa_ds.train_tokenizer.trainer import TokenizerTrainer
from tests.gates import Gates, install_in_tokenizer_training
from tests.ranks import Ranks
from tests.train_tokenizer import training_run as tiny


def records(run: Path, event: str) -> list[dict[str, Any]]:
    found = [record for record in read_metrics(run / "metrics.jsonl") if record["event"] == event]
    for record in found:
        del record["event"]
        record.pop("images_per_second", None)
        for number, share in enumerate(record.pop("codebook_use_by_scale")):
            record[f"codebook_use_of_scale_{number}"] = share
    return found


def assert_same_run(left: Path, right: Path, tolerance: float) -> None:
    """Weights, logged losses and usage of two runs agree, after optimizer steps of size 1e-3."""
    states = [Tokenizer.load(run).state_dict() for run in (left, right)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=tolerance, msg=f"{name}: {{}}".format)
    for event in ("train", "heldout"):
        ours, theirs = records(left, event), records(right, event)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=20 * tolerance, abs=tolerance) if tolerance else a == b


def test_a_run_learns_and_leaves_what_it_says(folder: Path) -> None:
    tiny.train(folder, "train.steps=40", "codebook.dropout=0.0", "log.evaluate_every=20")
    run = folder / "run"
    losses = [record["reconstruction"] for record in records(run, "train")]
    assert losses[-1] < 0.3 * losses[0]
    first, last = records(run, "heldout")
    assert last["psnr"] > first["psnr"] - 0.5
    assert last["num_images"] == 7
    assert 0 < last["codebook_use"] <= 1
    tokenizer = Tokenizer.load(run)
    images = torch.zeros(1, 3, 8, 8)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    picture = np.asarray(Image.open(run / "reconstructions.png"))
    assert picture.shape[0] > 2 * 64, "two rows of images, enlarged, below a title"
    assert picture.shape[1] > 7 * 64
    assert (run / "reconstructions" / "step-00000020.png").exists()
    assert tiny.TokenizerTrainingConfig.model_validate_json(
        torch.load(run / "checkpoint.pt", weights_only=True)["config"]
    ) == tiny.config(folder, "train.steps=40", "codebook.dropout=0.0", "log.evaluate_every=20")


@pytest.mark.parametrize("adversarial", ["null", tiny.ADVERSARIAL])
def test_resume_equals_an_uninterrupted_run(
    folder: Path, adversarial: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"loss.adversarial={adversarial}", "train.steps=8"]
    tiny.train(folder, *settings, f"output_dir={folder / 'whole'}")
    tiny.train_and_kill(folder, monkeypatch, *settings)
    with pytest.raises(UserError, match=r"no config\.json"):
        Tokenizer.load(folder / "run")
    tiny.train(folder, *settings)
    assert "resuming" in capsys.readouterr().out
    assert_same_run(folder / "run", folder / "whole", tolerance=0)

    tiny.train(folder, *settings)
    assert "is finished (8 steps); nothing to do" in capsys.readouterr().out


def test_weights_that_were_deleted_are_made_again(folder: Path) -> None:
    tiny.train(folder)
    weights = folder / "run/model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    tiny.train(folder)
    assert weights.read_bytes() == before


def test_an_evaluation_that_is_done_again_stands_there_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop at step 3, where an evaluation is due; the next start evaluates, and dies before it saves."""
    asked = tiny.Never()
    step = TokenizerTrainer.step

    def stopped_at_three(self: TokenizerTrainer, batches: Any) -> None:
        step(self, batches)
        asked.reason = "SIGUSR1" if self.step_index == 3 else None  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "step", stopped_at_three)
        assert not train_tokenizer(tiny.config(folder), asked)  # type: ignore[arg-type]
    tiny.train_and_kill(folder, monkeypatch)
    assert [record["step"] for record in records(folder / "run", "heldout")] == [3]
    tiny.train(folder)
    assert [record["step"] for record in records(folder / "run", "heldout")] == [3, 6]


def test_a_record_is_of_all_its_steps_after_a_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint after step 3, record after step 4: losses, revived codes and replaced images are those of 1 to 4."""
    tiny.make_images(folder / "torn", broken=5)
    settings = ["log.every=4", "train.steps=8", f"data.images={folder / 'torn'}", "data.on_damaged=skip"]
    tiny.train(folder, *settings, f"output_dir={folder / 'whole'}")
    tiny.train_and_kill(folder, monkeypatch, *settings)
    tiny.train(folder, *settings)
    assert_same_run(folder / "run", folder / "whole", tolerance=0)
    first, last = records(folder / "whole", "train")
    assert first["revived_codes"] >= 16
    assert first["replaced_samples"] + last["replaced_samples"] > 0


def test_two_ranks_equal_one(folder: Path) -> None:
    """Dropout, revival, the data-driven codebook and the adversary included."""
    settings = [f"loss.adversarial={tiny.ADVERSARIAL}", "optim.base_lr=0.003"]
    tiny.train(folder, *settings, f"output_dir={folder / 'one'}")
    tiny.train_on_ranks(folder, *settings)
    assert_same_run(folder / "run", folder / "one", tolerance=2e-4)


def test_a_run_of_one_rank_resumes_on_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"loss.adversarial={tiny.ADVERSARIAL}", "optim.base_lr=0.003"]
    tiny.train(folder, *settings, f"output_dir={folder / 'one'}")
    tiny.train_and_kill(folder, monkeypatch, *settings)
    tiny.train_on_ranks(folder, *settings)
    assert_same_run(folder / "run", folder / "one", tolerance=2e-4)


def test_micro_batches_equal_one_batch(folder: Path) -> None:
    settings = ["optim.base_lr=0.003"]
    tiny.train(folder, *settings, f"output_dir={folder / 'one'}")
    tiny.train(folder, *settings, "train.accumulation=4")
    assert_same_run(folder / "run", folder / "one", tolerance=2e-4)


def test_bf16_trains(folder: Path) -> None:
    tiny.train(folder, "precision=bf16", "train.steps=30", f"loss.adversarial={tiny.ADVERSARIAL}")
    losses = [record["reconstruction"] for record in records(folder / "run", "train")]
    assert losses[-1] < 0.6 * losses[0]


def test_start_from_a_saved_tokenizer(folder: Path) -> None:
    tiny.train(folder)
    tiny.train(folder, f"start_from={folder / 'run'}", f"output_dir={folder / 'more'}", "optim.base_lr=1e-9")
    before, after = Tokenizer.load(folder / "run"), Tokenizer.load(folder / "more")
    # nothing was drawn anew, not even the codebook; codes that died were revived
    torch.testing.assert_close(after.decoder.conv_out.weight, before.decoder.conv_out.weight, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"start_from: .*run: .* of another shape: .*conv"):
        tiny.train(folder, f"start_from={folder / 'run'}", f"output_dir={folder / 'x'}", "tokenizer.channels=64")


def test_start_from_weights_of_another_phi_ratio(tmp_path: Path) -> None:
    """No shape shows it, and the same weights would decode to something else."""
    sizes: dict[str, Any] = {
        "scales": (1, 2),
        "codebook_size": 8,
        "code_width": 4,
        "channels": 32,
        "channel_multipliers": (1, 1),
    }
    Tokenizer(TokenizerConfig(**sizes, phi_ratio=0.25)).save_pretrained(tmp_path / "weights")
    with pytest.raises(UserError, match=r"start_from: .*weights was .* 0\.25, .* 0\.5; set tokenizer\.phi_ratio=0\.25"):
        _start_from(Tokenizer(TokenizerConfig(**sizes)), tmp_path / "weights")
    _start_from(Tokenizer(TokenizerConfig(**sizes, phi_ratio=0.25)), tmp_path / "weights")


def test_a_signal_on_any_rank_saves_and_asks_to_be_started_again(folder: Path) -> None:
    """The stopped run goes on exactly; an evaluation that was due at the stop comes first."""
    settings = ["train.steps=9", "log.evaluate_every=1", "log.checkpoint_every=1000"]
    tiny.train_on_ranks(folder, *settings, f"output_dir={folder / 'whole'}")
    run, gates, log = folder / "run", Gates(folder / "gates", "step_4"), folder / "log"
    words = [str(tiny.write_recipe(folder, *settings))]
    install = partial(install_in_tokenizer_training, gates.folder)
    with Ranks(words, 2, log, install, "train_tokenizer") as ranks:
        gates.wait("step_4", 2, ranks.check)
        ranks.signal(signal.SIGUSR1, 1)
        gates.wait_noted(1)
        gates.open("step_4")
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, log.read_text()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "requeue"
    assert status["step"] in (4, 5)
    assert f"stopped at step {status['step']} of 9 (another rank was asked to stop)" in log.read_text()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == status["step"]
    assert [record["step"] for record in records(run, "heldout")] == list(range(1, status["step"]))
    tiny.train_on_ranks(folder, *settings)
    assert_same_run(run, folder / "whole", tolerance=0)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_shards_that_others_made(folder: Path) -> None:
    tiny.train(folder, f"output_dir={folder / 'indexed'}")
    for name in ("images", "heldout"):
        (folder / name / "index.json").unlink()
    tiny.train(folder)
    assert_same_run(folder / "run", folder / "indexed", tolerance=0)


def test_a_damaged_image_is_replaced_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.make_images(folder / "torn", broken=5)
    tiny.train(folder, f"data.images={folder / 'torn'}", "data.on_damaged=skip")
    # 6 steps of 8 images see each of 24 images twice
    assert sum(record["replaced_samples"] for record in records(folder / "run", "train")) == 2
    assert capsys.readouterr().err.count("rank 0: damaged sample replaced: ") == 2


def test_a_damaged_image_ends_all_ranks(folder: Path) -> None:
    tiny.make_images(folder / "torn", broken=5)
    recipe, log = tiny.write_recipe(folder, f"data.images={folder / 'torn'}"), folder / "log"
    with Ranks([str(recipe)], 2, log, command="train_tokenizer") as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    assert log.read_text().count("sample '000005': not a readable image") == 1
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "failed"
