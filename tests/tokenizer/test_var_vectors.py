"""The tokenizer against vectors made with VAR's own code, and against VAR's official key table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.tokenizer import MultiScaleQuantizer, Tokenizer
from tests.var_fixtures import PIXEL_ATOL, TINY_SCALES, fixture_state, random_state, vector


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES)


def test_config_is_read_off_the_shapes(tiny: Tokenizer) -> None:
    assert tiny.config == TokenizerConfig(scales=TINY_SCALES, codebook_size=64, code_width=8, channels=32)
    assert not tiny.training
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_latent(tiny: Tokenizer) -> None:
    torch.testing.assert_close(tiny.latent(vector("image")), vector("latent"), rtol=0, atol=1e-5)


def test_token_ids_are_exact(tiny: Tokenizer) -> None:
    assert torch.equal(tiny.encode(vector("image")), vector("tokens"))
    assert torch.equal(tiny.quantizer.tokens_of(vector("latent")), vector("tokens"))


def test_teacher_input(tiny: Tokenizer) -> None:
    inputs = tiny.inputs_from_tokens(vector("tokens"))
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, vector("teacher_input"), rtol=0, atol=1e-5)


def test_reconstruction(tiny: Tokenizer) -> None:
    torch.testing.assert_close(tiny.decode(vector("tokens")), vector("reconstruction"), rtol=0, atol=2 * PIXEL_ATOL)


def test_official_checkpoint_loads_strictly(tmp_path: Path) -> None:
    state = random_state("vae_ch160v4096z32")
    torch.save(state, tmp_path / "vae.pth")
    tokenizer = Tokenizer.from_var(tmp_path / "vae.pth")
    assert tokenizer.config == TokenizerConfig()
    assert torch.equal(tokenizer.quantizer.codebook.weight, state["quantize.embedding.weight"])
    assert torch.equal(
        tokenizer.get_parameter("decoder.up.4.attn.2.proj_out.bias"), state["decoder.up.4.attn.2.proj_out.bias"]
    )
    larger = Tokenizer.from_var(state, scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
    assert larger.config.image_side == 512
    assert larger.schedule.num_tokens == 2240


def test_ticks_are_vars() -> None:
    """VAR's ticks for four phi are 1/12, 13/36, 23/36, 11/12. Scales 3 and 8 of ten lie halfway: up, by rounding."""
    quantizer = MultiScaleQuantizer(TokenizerConfig(code_width=2, codebook_size=2))
    assert quantizer._phi_of_scale == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("num_phi", [1, 3, 4])
def test_all_three_ways_of_storing_phi(num_phi: int) -> None:
    state = fixture_state("tiny_vae")
    phi = {name: state.pop(name) for name in list(state) if "quant_resi" in name}
    for index in range(num_phi):
        for leaf in ("weight", "bias"):
            middle = {1: "qresi.", 3: f"qresi_ls.{index}.", 4: f"{index}."}[num_phi]
            state[f"quantize.quant_resi.{middle}{leaf}"] = phi[f"quantize.quant_resi.qresi_ls.{index}.{leaf}"]
    tokenizer = Tokenizer.from_var(state, scales=TINY_SCALES)
    assert tokenizer.config.num_phi == num_phi
    if num_phi == 4:  # one phi a scale, and four scales: the same numbers as four shared ones
        assert torch.equal(tokenizer.encode(vector("image")), vector("tokens"))


class TestBadWeights:
    def test_scales_must_be_given_where_they_cannot_be_known(self) -> None:
        with pytest.raises(UserError, match="made for 4 scales, not for VAR's 10: say which"):
            Tokenizer.from_var(fixture_state("tiny_vae"))

    def test_missing_and_unexpected_keys(self) -> None:
        state = fixture_state("tiny_vae")
        state["decoder.mid.blok_1.conv1.bias"] = state.pop("decoder.mid.block_1.conv1.bias")
        with pytest.raises(
            UserError, match=r"1 missing: decoder\.mid\.block_1\.conv1\.bias \(nearest: decoder\.mid\.blok_1"
        ):
            Tokenizer.from_var(state, scales=TINY_SCALES)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_conv.weight": None}, r"1 missing: quant_conv\.weight$"),
            ({"quant_cnv.weight": torch.zeros(8)}, r"1 unexpected: quant_cnv\.weight \(nearest: quant_conv\.weight\)$"),
            ({"quantize.quant_resi.qresi_ls.2.bias": None}, r"1 missing: quantize\.quant_resi\.qresi_ls\.2\.bias$"),
            ({"quantize.embedding.weight": torch.zeros(512)}, r"quantize\.embedding\.weight: \(512,\) .*, \(64, 8\)"),
            ({"quantize.embedding.weight": torch.zeros(64, 9)}, r"shape: quantize\.embedding\.weight: \(64, 9\).*8\)"),
            ({"encoder.conv_in.weight": torch.tensor(1.0)}, r"1 of another shape: encoder\.conv_in\.weight: \(\) in"),
            (
                {"encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)},
                r"shape: encoder\.conv_in\.weight: \(64, 3, 3, 3\) in",
            ),
            (
                {"encoder.down.1.block.0.conv1.weight": torch.zeros(64, 32, 3, 3)},
                r"shape: encoder\.down\.1\.block\.0\.conv1\.weight: \(64, 32, 3, 3\) in",
            ),
        ],
    )
    def test_the_one_tensor_at_fault_is_named_as_in_the_file(
        self, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
    ) -> None:
        state = {**fixture_state("tiny_vae"), **change}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "vae.pth")
        with pytest.raises(UserError, match=r"vae\.pth: the weights do not fit the model; " + r"[^;]*" + message):
            Tokenizer.from_var(tmp_path / "vae.pth", scales=TINY_SCALES)

    def test_wrong_shape(self) -> None:
        state = fixture_state("tiny_vae")
        state["encoder.mid.block_1.conv1.weight"] = torch.zeros(128, 64, 3, 3)
        with pytest.raises(
            UserError,
            match=r"encoder\.mid\.block_1\.conv1\.weight: \(128, 64, 3, 3\) in the weights, \(128, 128, 3, 3\)",
        ):
            Tokenizer.from_var(state, scales=TINY_SCALES)

    def test_not_a_tokenizer(self) -> None:
        with pytest.raises(UserError, match=r"not a VAR tokenizer.*pos_start"):
            Tokenizer.from_var(fixture_state("tiny_var_adaln"))
        with pytest.raises(UserError, match=r"key 'encoder\.conv_in\.weight' is missing"):
            Tokenizer.from_var({"quantize.embedding.weight": torch.zeros(4, 2)})

    def test_the_codebook_under_another_name(self) -> None:
        state = fixture_state("tiny_vae")
        state["quantize.embeding.weight"] = state.pop("quantize.embedding.weight")
        with pytest.raises(
            UserError, match=r"no key quantize\.embedding\.weight \(nearest: quantize\.embeding\.weight\)"
        ):
            Tokenizer.from_var(state, scales=TINY_SCALES)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("quantizer.codebook.weight", (64, 8)), ("to_latent.bias", (8,)), ("quantize.quant_resi.1.bias", (8,))],
    )
    def test_names_that_would_replace_an_official_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        state = fixture_state("tiny_vae")
        for with_it in ({name: torch.zeros(shape), **state}, {**state, name: torch.zeros(shape)}):
            with pytest.raises(UserError, match=r"1 unexpected: [a-z_.0-9]* \(not in VAR's layout\)"):
                Tokenizer.from_var(with_it, scales=TINY_SCALES)

    @pytest.mark.parametrize("scales", [5, ("1", 2), [2.0]])
    def test_scales_that_are_none(self, tiny: Tokenizer, tmp_path: Path, scales: Any) -> None:
        tiny.save_pretrained(tmp_path)
        for source in (fixture_state("tiny_vae"), tmp_path):
            read: Any = Tokenizer.load if isinstance(source, Path) else Tokenizer.from_var
            with pytest.raises(UserError, match=r"scales: expected sides such as \(1, 2, 3, 4\), got "):
                read(source, scales=scales)

    def test_pickle(self, tmp_path: Path) -> None:
        torch.save({"quantize.embedding.weight": Path("x")}, tmp_path / "vae.pth")
        with pytest.raises(UserError, match="not a plain state dict"):
            Tokenizer.from_var(tmp_path / "vae.pth")

    def test_scales_that_do_not_end_in_the_latents_side(self, tiny: Tokenizer) -> None:
        with pytest.raises(UserError, match=r"latent is 2 x 2, but the last of the scales \[1, 2, 3, 4\] is 4"):
            tiny.encode(torch.zeros(1, 3, 32, 32))
        with pytest.raises(UserError, match="sides must grow"):
            Tokenizer.from_var(fixture_state("tiny_vae"), scales=(1, 3, 2))
        with pytest.raises(UserError, match=r"tokens have shape \(1, 29\)"):
            tiny.decode(torch.zeros(1, 29, dtype=torch.int64))
