"""One step of the tokenizer's trainer: gradients against the loss written out, and where codes start and move to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.data.images import ImageBatch
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.tokenizer.discriminator import hinge_loss
from mepa_ds.train_tokenizer.revival import Revival
from mepa_ds.train_tokenizer.trainer import TokenizerTrainer
from tests.reference import AdamW
from tests.train_tokenizer import training_run as tiny

ADVERSARIAL = "{weight: 0.5, adaptive: false, num_layers: 1, channels: 32, start_step: 1}"
NONE = ["reconstruction=0.0", "codebook=0.0", "commitment=0.0"]


class PlainDistance(nn.Module):
    """In LPIPS's place: a distance of its own, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, left_B3HW: Tensor, right_B3HW: Tensor) -> Tensor:
        self.given.append((left_B3HW, right_B3HW))
        return distance(left_B3HW, right_B3HW)


def distance(left_B3HW: Tensor, right_B3HW: Tensor) -> Tensor:
    return (left_B3HW.sin() - right_B3HW.sin()).abs().mean((1, 2, 3), keepdim=True)


def make_trainer(folder: Path, *overrides: str, start_step: int = 0) -> TokenizerTrainer:
    torch.manual_seed(0)
    config = tiny.config(folder, *overrides)
    trainer = TokenizerTrainer(config, Tokenizer(config.tokenizer), 10, torch.device("cpu"))
    trainer.step_index = start_step
    return trainer


def make_batch(count: int, seed: int = 0) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    pixels_B3HW = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageBatch(pixels_B3HW, torch.zeros(count, dtype=torch.int64), ("",) * count, count)


def written_out(tokenizer: Tokenizer, images_B3HW: Tensor) -> dict[str, Tensor]:
    """The terms, with VAR's quantisation as a plain loop over scales."""
    latent = tokenizer.latent(images_B3HW)
    quantizer, f_hat, codebook, commitment = tokenizer.quantizer, torch.zeros_like(latent), [], []
    for scale, tokens_Bl in enumerate(tokenizer.schedule.split(quantizer.tokens_of(latent))):
        f_hat = quantizer.add_scale(f_hat, tokens_Bl, scale)
        codebook.append((f_hat - latent.detach()).square().mean())
        commitment.append((f_hat.detach() - latent).square().mean())
    straight_through = latent + (f_hat - latent).detach()
    reconstruction = tokenizer.reconstruct(straight_through)
    return {
        "image": reconstruction,
        "reconstruction": (reconstruction - images_B3HW).square().mean(),
        "codebook": torch.stack(codebook).mean(),
        "commitment": torch.stack(commitment).mean(),
    }


def assert_gradients(trainer: TokenizerTrainer, loss: Tensor) -> None:
    expected = torch.autograd.grad(loss, trainer.parameters, allow_unused=True, materialize_grads=True)
    names = [name for name, _ in trainer.tokenizer.named_parameters()]
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 0
    for name, parameter, gradient in zip(names, trainer.parameters, expected, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # Biases before a norm have gradients that are rounding alone.
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6 * largest, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("term", ["reconstruction", "codebook", "commitment"])
def test_each_term_alone_has_the_gradients_of_its_loss(tmp_path: Path, term: str) -> None:
    weights = [f"loss.{value}" for value in NONE] + [f"loss.{term}=0.7", "train.accumulation=2"]
    trainer, images = make_trainer(tmp_path, *weights), make_batch(4).images_B3HW
    nn.init.normal_(trainer.tokenizer.quantizer.codebook.weight)
    trainer._accumulate(images, None)
    terms = written_out(trainer.tokenizer, images)
    assert_gradients(trainer, 0.7 / 2 * terms[term])
    for name in ("reconstruction", "codebook", "commitment"):  # measured, whatever they weigh
        torch.testing.assert_close(2 * trainer._totals[name], terms[name].detach(), rtol=1e-4, atol=1e-6)


def test_the_perceptual_term_sees_both_images_as_they_are(tmp_path: Path) -> None:
    """In [-1, 1], as LPIPS expects, and with a gradient for the reconstruction."""
    trainer, images = make_trainer(tmp_path, *(f"loss.{value}" for value in NONE)), make_batch(4).images_B3HW
    perceptual = {"weight": 0.3, "backbone_weights": tmp_path / "unread.pth"}
    loss = trainer.config.loss.model_validate({**trainer.config.loss.model_dump(), "perceptual": perceptual})
    trainer.config = trainer.config.model_copy(update={"loss": loss})
    trainer.lpips = PlainDistance()
    trainer._accumulate(images, None)
    terms = written_out(trainer.tokenizer, images)
    assert_gradients(trainer, 0.3 * distance(terms["image"], images).mean())
    ((left, right),) = trainer.lpips.given
    torch.testing.assert_close(left, terms["image"])
    assert torch.equal(right, images)
    assert images.min() < -0.9


def test_the_adversary_waits_for_its_step(tmp_path: Path) -> None:
    settings = [f"loss.{value}" for value in NONE[1:]] + [f"loss.adversarial={ADVERSARIAL}"]
    images = make_batch(4).images_B3HW
    before = make_trainer(tmp_path, *settings)
    assert before.adversary is not None
    before._accumulate(images, None)
    assert_gradients(before, written_out(before.tokenizer, images)["reconstruction"])
    assert all(parameter.grad is None for parameter in before.adversary.discriminator.parameters())

    after = make_trainer(tmp_path, *settings, start_step=1)
    assert after.adversary is not None
    after._accumulate(images, None)
    terms, discriminator = written_out(after.tokenizer, images), after.adversary.discriminator
    assert_gradients(after, terms["reconstruction"] - 0.5 * discriminator(terms["image"]).mean())
    logits = discriminator(images), discriminator(terms["image"].detach())
    expected = torch.autograd.grad(hinge_loss(*logits), list(discriminator.parameters()))
    for parameter, gradient in zip(discriminator.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_step_before_the_adversarys_leaves_it_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, f"loss.adversarial={ADVERSARIAL}")
    assert trainer.adversary is not None
    start = copy.deepcopy(trainer.adversary.discriminator.state_dict())
    for number, moved in enumerate([False, True]):
        trainer.step(iter([make_batch(8, seed=number)]))
        now = trainer.adversary.discriminator.state_dict()
        assert any(not torch.equal(now[name], start[name]) for name in start) == moved


def test_steps_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, Adam's moments, decay of kernels alone and the rates of a warm-up, for tokenizer and discriminator."""
    optim = ["base_lr=0.32", "betas=[0.8,0.9]", "eps=1e-3", "weight_decay=0.5", "clip=0.05"]
    optim += ["warmup=0.2", "warmup_start=0.1"]
    adversarial = ADVERSARIAL.replace("start_step: 1", "start_step: 0, lr_factor: 0.25")
    settings = [
        "start_from=weights",
        "tokenizer.num_phi=3",
        f"loss.adversarial={adversarial}",
        *(f"optim.{value}" for value in optim),
    ]
    trainer = make_trainer(tmp_path, *settings)
    assert trainer.adversary is not None
    modules = {"tokenizer": trainer.tokenizer, "discriminator": trainer.adversary.discriminator}
    by_hand = {
        name: AdamW(
            {key: value.detach().double() for key, value in module.named_parameters()},
            betas=(0.8, 0.9), eps=1e-3, decay=0.5, clip=0.05, ema=0.0, decays=lambda _, value: value.ndim == 4,
        )
        for name, module in modules.items()
    }  # fmt: skip
    gradients: dict[str, Any] = {}
    accumulate = TokenizerTrainer._accumulate

    def noting(self: TokenizerTrainer, *arguments: Any) -> Any:
        quantized = accumulate(self, *arguments)
        for name, module in modules.items():
            found = {key: p.grad for key, p in module.named_parameters()}
            gradients[name] = {
                key: torch.zeros_like(by_hand[name].weights[key]) if grad is None else grad.double().clone()
                for key, grad in found.items()
            }
        return quantized

    monkeypatch.setattr(TokenizerTrainer, "_accumulate", noting)
    peak = 0.32 * 8 / 256
    for number, rate in enumerate((0.1, 0.55)):
        trainer.step(iter([make_batch(8, seed=number)]))
        for name, factor in (("tokenizer", 1.0), ("discriminator", 0.25)):
            norm = by_hand[name].apply(gradients[name], factor * rate * peak)
            assert norm > 0.06, f"{name}: nothing is clipped"
            for key, value in modules[name].named_parameters():
                expected = by_hand[name].weights[key].detach().float()
                where = f"{name} {key} in step {number}"
                torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6, msg=where)


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_codes_start_on_the_latents_own_residuals(tmp_path: Path, dropout: float) -> None:
    """Not on what random codes leave of them; without repeats, and not at scales that an image leaves out."""
    trainer = make_trainer(tmp_path, "tokenizer.phi_ratio=0.0", f"codebook.dropout={dropout}")
    batch = make_batch(8)
    with torch.no_grad():
        latent = trainer.tokenizer.latent(batch.images_B3HW)
    pooled = [F.adaptive_avg_pool2d(latent, side).flatten(2).transpose(1, 2) for side in (1, 2, 4)]
    rows_GLC = torch.cat(pooled, dim=1)
    num_scales_G = trainer._num_scales(0, 8)
    if num_scales_G is not None:
        rows_GLC[trainer.tokenizer.schedule.scale_index_L() >= num_scales_G[:, None]] = torch.inf
    trainer.step(iter([batch]))
    gaps_VN = torch.cdist(trainer.tokenizer.quantizer.codebook.weight, rows_GLC.flatten(0, 1), p=torch.inf)
    nearest = gaps_VN.nan_to_num(torch.inf).min(1)
    assert nearest.values.max() < 1e-6
    assert len(nearest.indices.unique()) == 16


def test_weights_that_are_given_keep_their_codes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny.config(tmp_path).tokenizer)
    codes = tokenizer.quantizer.codebook.weight.detach().clone()
    config = tiny.config(tmp_path, "start_from=weights")
    trainer = TokenizerTrainer(config, tokenizer, 10, torch.device("cpu"))
    trainer.step(iter([make_batch(8)]))
    assert (trainer.tokenizer.quantizer.codebook.weight - codes).abs().max() < 0.01


def test_revived_codes_are_residuals_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, "codebook.dropout=0.0", "train.accumulation=2")
    seen: list[Tensor] = []
    accumulate = TokenizerTrainer._accumulate

    def noting(self: TokenizerTrainer, *arguments: Any) -> Any:
        quantized = accumulate(self, *arguments)
        seen.append(quantized.residuals_BLC.flatten(0, 1))
        return quantized

    monkeypatch.setattr(TokenizerTrainer, "_accumulate", noting)
    for number in range(3):
        if number == 2:  # revive_every
            trainer.usage.mean_SV[:] = 1 / 16
            trainer.usage.mean_SV[:, 3:7] = 0
            seen.clear()
        trainer.step(iter([make_batch(4, seed=2 * number), make_batch(4, seed=2 * number + 1)]))
    codebook = trainer.tokenizer.quantizer.codebook.weight
    equal_VN = (codebook[:, None] == torch.cat(seen)).all(-1)
    assert equal_VN.any(1).nonzero().flatten().tolist() == [3, 4, 5, 6]
    assert len(equal_VN.nonzero()[:, 1].unique()) == 4
    assert not trainer.optimizer.state[codebook]["exp_avg"][3:7].any()
    assert trainer._num_revived == 16 + 4


@pytest.mark.parametrize("num_dead", [5, 20])
def test_chosen_tokens_repeat_only_when_all_are_used(num_dead: int) -> None:
    counts_GL = torch.tensor([[True] * 4 + [False] * 2] * 2)
    revival = Revival.drawn(torch.arange(num_dead), counts_GL, 3, (0, 1))
    assert counts_GL[revival.sample_D, revival.token_D].all()
    times = torch.bincount(revival.sample_D * 6 + revival.token_D)
    assert int(times.max()) == -(-num_dead // 8)
    residuals_GLC = torch.randn(2, 6, 3)
    for sample in range(2):
        revival.collect(residuals_GLC[sample : sample + 1], offset=sample)
    assert torch.equal(revival.values_DC, residuals_GLC[revival.sample_D, revival.token_D])
