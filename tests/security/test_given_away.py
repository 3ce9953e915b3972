"""What is given away (cards, images) holds nothing of the giver's machine, even where a run's directory is a trap."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from mepa_ds.images.pictures import save_png
from mepa_ds.model_cards.card import _classes, _copy_picture, _text, _use
from tests.security.hostile import CONTROL, NAME


def test_a_card_shows_pictures_alone(tmp_path: Path) -> None:
    """A link in a stranger's run does not put a file of the user's into a card, and a picture's text stays behind."""
    secret, samples = tmp_path / "id_rsa", tmp_path / "run/samples"
    secret.write_text("PRIVATE KEY")
    samples.mkdir(parents=True)
    (samples / "step_00000009.png").symlink_to(secret)
    save_png(np.zeros((8, 8, 3), np.uint8), samples / "step_00000005.png", "/home/alice/weights")
    found: Any = SimpleNamespace(run=tmp_path / "run", step=None)
    copied = _copy_picture(found, tmp_path / "card")
    assert copied is not None
    assert [path.name for path in (tmp_path / "card/samples").iterdir()] == ["step_00000005.png"]
    data = (tmp_path / "card/samples/step_00000005.png").read_bytes()
    assert b"alice" not in data
    assert Image.open(tmp_path / "card/samples/step_00000005.png").size == (8, 8)
    (samples / "step_00000010.png").write_text("PRIVATE KEY")
    assert _copy_picture(found, tmp_path / "card") is None


def test_a_cards_code_is_ours() -> None:
    """It is made to be pasted: a class name ends neither a block of code nor a word."""
    names = (f"x\n```\nrm -rf ~\n{NAME}", "'; rm -rf ~; '")
    model: Any = SimpleNamespace(class_names=names, config=SimpleNamespace(num_classes=2))
    used = _use(model, SimpleNamespace(repository=None))  # type: ignore[arg-type]
    assert not CONTROL.search(used + _classes(model) + _text(NAME))
    assert used.count("\n```") == 4, "two blocks of code"
    line = next(line for line in used.splitlines() if line.startswith("mepa sample"))
    assert """--classes ''"'"'; rm -rf ~; '"'"'' --out""" in line
