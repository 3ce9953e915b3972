"""`mepa export`: of runs, with a model card, and to a stand-in of the hub."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mepa_ds.cli import export as command
from mepa_ds.cli import sample as sample_command
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.model_cards.hub import TOKEN, local_hub, point_to
from tests.serving.project import make_project

NAMES = ('6" pipe, 1|2', "<script>alert(1)</script>", "`a` [b](c) *d*\nÉ")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with records, pictures and scores."""
    folder = tmp_path_factory.mktemp("project")
    run = make_project(folder, NAMES)
    records = [
        {"event": "start", "step": 0, "world_size": 2, "device": "a CPU", "precision": "fp32"},
        {"event": "train", "step": 10, "epoch": 2.0},
        {"event": "heldout", "step": 10, "ce": 1.25, "ce_last": 1.5, "accuracy": 0.5, "best": True},
        {"event": "train", "step": 20, "epoch": 4.0},
        {"event": "heldout", "step": 20, "ce": 9.75, "ce_last": 9.5, "accuracy": 0.1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "samples").mkdir()
    for step in (5, 10, 20):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(run / "samples" / f"step_{step:08d}.png")
    scores = {"class_agreement": 0.987, "class_agreement_low": 0.98, "class_agreement_high": 0.99, "num_samples": 500}
    (folder / "runs" / "scores.json").write_text(json.dumps({**scores, "protocol": {"remarks": []}}))
    return folder


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_card_tells_the_run(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command.main([str(project), str(out), "--card", "--license", "mit", "--dataset", "ylecun/mnist"])
    card = (out / "README.md").read_text()
    facts = front_matter(card)
    assert (facts["license"], facts["datasets"], facts["library_name"]) == ("mit", ["ylecun/mnist"], "mepa_ds")
    assert "mixture-of-experts" in facts["tags"]
    for row in (
        "| Training steps | 10 |",
        "| Epochs | 2 |",
        "| Held-out cross-entropy (nats a token) | 1.2500 |",
        "| `class_agreement` | 0.987 (0.98 to 0.99) |",
        "| Trained on | 2 x a CPU, fp32 |",
        '| 0 | 6" pipe, 1\\|2 |',
        "| 1 | &lt;script&gt;alert(1)&lt;/script&gt; |",
        "| 2 | \\`a\\` \\[b\\](c) \\*d\\* É |",
    ):
        assert row in card, row
    assert "9.75" not in card, "another step's"
    assert "num_samples" not in card
    assert "To be filled in" not in card
    assert "note:" not in capsys.readouterr().out
    assert [path.name for path in (out / "samples").iterdir()] == ["step_00000010.png"]
    assert "![Samples](samples/step_00000010.png)" in card


def test_what_the_card_says_works(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    command.main([str(project), str(out), "--card"])
    card = (out / "README.md").read_text()
    blocks = dict(re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", card))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(out))
    seen: dict[str, Any] = {}
    exec(blocks["python"], seen)  # of our own making
    assert seen["images"].shape == (4, 3, 6, 6)
    monkeypatch.chdir(out)
    words = shlex.split(blocks["bash"].splitlines()[0])
    sample_command.main(words[2:])
    assert (out / "samples.png").exists()
    (tmp_path / "recipe.yaml").write_text(blocks["yaml"])
    again = load_config(PretrainConfig, tmp_path / "recipe.yaml")
    assert again.model.num_classes == 3
    assert str(again.parallel.deepspeed) == "zero2.json", "no directories of this machine"
    assert NextScaleTransformer.load(out).class_names == NAMES
    assert Tokenizer.load(out / "tokenizer").config.image_side == 6


def test_what_is_not_known_is_to_be_filled_in(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(project, tmp_path / "bare") / "runs" / "pretrain"
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "samples")
    command.main([str(run), str(tmp_path / "out"), "--card"])
    card = (tmp_path / "out/README.md").read_text()
    assert "license" not in front_matter(card)
    assert card.count("To be filled in.") == 2
    assert "![" not in card
    said = [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert said == ["numbers", "pictures", "licence", "data"]
    command.main([str(run / "last"), str(tmp_path / "last")])
    assert json.loads((tmp_path / "last/training.json").read_text()) == {"step": 20}
    assert not (tmp_path / "last/README.md").exists()


def test_a_push_is_the_directory_and_no_more(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "private.txt").write_text("mine")
    with local_hub(monkeypatch) as hub:
        words = [str(project), str(out), "--push-to-hub", "jane/shirts", "--private", "--license", "mit"]
        command.main(words)
        assert capsys.readouterr().out.endswith(f"{hub.address}/jane/shirts\n")
        files = hub.files["jane/shirts"]
        assert hub.created["jane/shirts"].get("private", hub.created["jane/shirts"].get("visibility")) in (
            True,
            "private",
        )
        assert set(files) == {
            "README.md",
            "config.json",
            "model.safetensors",
            "training.json",
            "samples/step_00000010.png",
            "tokenizer/config.json",
            "tokenizer/model.safetensors",
        }
        assert all(content == (out / name).read_bytes() for name, content in files.items())
        assert b'snapshot_download("jane/shirts")' in files["README.md"]
        hub.refuses_with = 403
        with pytest.raises(
            UserError, match=r"refuses \(status 403, You may not\); log in .* to jane/shirts\. "
        ) as told:
            command.main(words)
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UserError, match=r"the hub at http://127\.0\.0\.1:\d+ cannot be reached .*look at the network"):
        command.main(words)
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err + str(told.value)


def test_mistakes_are_one_message(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    run = project / "runs" / "pretrain"
    mistakes: list[tuple[list[Path | str], str]] = [
        ([run, run / "best"], "best: holds what is exported; give another directory"),
        ([project / "nowhere", tmp_path / "x"], "nowhere: not there; give a checkpoint, a run, or exported weights"),
        ([project, tmp_path / "x", "--license", "mit"], "--license belongs to --card"),
        ([project, tmp_path / "x", "--private"], "--private belongs to --push-to-hub"),
        ([project, tmp_path / "x", "--push-to-hub", "jane"], "--push-to-hub: expected OWNER/NAME, such as jane/"),
        ([project, tmp_path / "x", "--push-to-hub", "a b/c"], "--push-to-hub: expected OWNER/NAME"),
        (
            [project, tmp_path / "x", "--push-to-hub", "jane/x"],
            r"nobody is logged in to the hub here; log in \(hf",
        ),
        ([project, tmp_path / "x", "--ema"], "no checkpoint"),
    ]
    for words, message in mistakes:
        with pytest.raises(UserError, match=message):
            command.main(list(map(str, words)))
    assert not (tmp_path / "x" / "config.json").exists()


def test_a_run_that_diverged_has_a_card(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its log has "nan" where a number should be."""
    metrics = project / "runs/pretrain/metrics.jsonl"
    before = metrics.read_text()
    records = [
        {"event": "train", "step": 5, "epoch": "nan", "loss": "nan"},
        {"event": "heldout", "step": 10, "ce": "nan", "ce_last": "nan", "accuracy": 0.25},
        {"step": 10, "of": "other hands"},
    ]
    metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    try:
        command.main([str(project), str(tmp_path / "out"), "--card"])
    finally:
        metrics.write_text(before)
    assert "the held-out cross-entropy of this step is not finite" in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    assert "| Held-out accuracy of the next token | 0.2500 |" in card
    assert "cross-entropy" not in card
