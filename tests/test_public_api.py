"""The public names, used as the README shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mepa_ds
from tests.var_fixtures import TINY_SCALES, fixture_state, vector


def test_the_readme_from_top_to_bottom(tmp_path: Path) -> None:
    torch.save(fixture_state("tiny_vae"), tmp_path / "vae.pth")
    torch.save(fixture_state("tiny_var_adaln"), tmp_path / "var.pth")

    tokenizer = mepa_ds.Tokenizer.from_var(str(tmp_path / "vae.pth"), scales=TINY_SCALES)
    tokens_BL = tokenizer.encode(vector("image"))
    assert tokens_BL.dtype == torch.int64
    assert torch.equal(tokens_BL, vector("tokens"))
    images_B3HW = tokenizer.decode(tokens_BL)
    assert images_B3HW.shape == vector("image").shape
    inputs_BLC = tokenizer.inputs_from_tokens(tokens_BL)
    assert inputs_BLC.shape == (2, 29, 8)

    model = mepa_ds.NextScaleTransformer.from_var(str(tmp_path / "var.pth"), scales=TINY_SCALES)
    with torch.no_grad():
        logits_BLV = model(vector("labels"), inputs_BLC).logits_BLV
    torch.testing.assert_close(logits_BLV, vector("logits_adaln"), atol=1e-5, rtol=1e-5)

    images_B3HW = mepa_ds.sample(model, tokenizer, [2, 7], cfg=1.5, top_k=900, top_p=0.96, seed=0)
    assert images_B3HW.shape == (2, 3, 64, 64)
    assert 0 <= images_B3HW.min() <= images_B3HW.max() <= 1

    for name, saved in (("model", model), ("tokenizer", tokenizer)):
        mepa_ds.save_pretrained(saved, tmp_path / name)
        loaded = mepa_ds.load_pretrained(tmp_path / name)
        assert type(loaded) is type(saved)
        assert loaded.config == saved.config
        assert not loaded.training
        for key, value in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    again = mepa_ds.sample(
        mepa_ds.load_pretrained(tmp_path / "model"),  # type: ignore[arg-type]
        mepa_ds.load_pretrained(str(tmp_path / "tokenizer")),  # type: ignore[arg-type]
        torch.tensor([2, 7]),
        seed=0,
    )
    assert torch.equal(again, images_B3HW)


def test_state_dicts_in_memory_and_fresh_models() -> None:
    tokenizer = mepa_ds.Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES)
    assert tokenizer.schedule == mepa_ds.ScaleSchedule(TINY_SCALES)
    model = mepa_ds.NextScaleTransformer.from_preset(
        "mepa-d2", num_classes=5, scales=TINY_SCALES, codebook_size=64, code_width=8
    )
    assert mepa_ds.sample(model.eval(), tokenizer, [4]).shape == (1, 3, 64, 64)


def test_what_can_go_wrong(tmp_path: Path) -> None:
    with pytest.raises(mepa_ds.UserError, match=r"no config\.json here"):
        mepa_ds.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(mepa_ds.UserError, match=r"holds 'bert'; expected 'next_scale_transformer' or 'tokenizer'"):
        mepa_ds.load_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mepa_ds.nothing  # noqa: B018
    assert set(mepa_ds.__all__) == set(dir(mepa_ds))
