"""The discriminator's losses, the adaptive weight, LPIPS and the random streams of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mepa_ds.config.tokenizer_training import AdversarialConfig, TokenizerOptimConfig
from mepa_ds.errors import UserError
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.tokenizer.discriminator import LeCam, PatchDiscriminator, generator_loss, hinge_loss
from mepa_ds.tokenizer.perceptual import load_lpips
from mepa_ds.train_tokenizer.adversary import Adversary, adaptive_weight
from mepa_ds.train_tokenizer.trainer import TokenizerTrainer
from tests.train_tokenizer import training_run as tiny


def test_hinge_and_lecam_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-0.5, 1.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0.5 + 2) / 2))
    assert float(generator_loss(fake)) == pytest.approx(-0.25)
    lecam = LeCam(decay=0.5)
    lecam.update(torch.tensor([2.0, -1.0]))
    assert lecam.anchors.tolist() == [1.0, -0.5]
    expected = ((2.5**2 + 1.0**2) / 2) + ((1.5**2 + 0) / 2)
    assert float(lecam(real, fake)) == pytest.approx(expected)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_image_of_the_discriminator(num_layers: int) -> None:
    discriminator, side = PatchDiscriminator(32, num_layers), PatchDiscriminator.smallest_side(num_layers)
    assert discriminator(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 3, side - 2**num_layers, side - 2**num_layers))


def test_a_patch_logit_sees_seventy_pixels() -> None:
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    discriminator = PatchDiscriminator(32, 3)
    for layer in discriminator:  # GroupNorm sees the whole map; leave it out to see the convolutions' own field
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x  # type: ignore[assignment, method-assign]
    logits = discriminator(image + 0.1)
    (gradient,) = torch.autograd.grad(logits[0, 0, 15, 15], image)
    rows = gradient.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_adaptive_weight_makes_gradients_equally_large() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(8, 4)
    first, second = layer(x).square().mean(), 100 * layer(x).cos().mean()
    assert isinstance(layer.weight, nn.Parameter)
    weight = adaptive_weight(first, second, layer.weight)
    assert not weight.requires_grad
    (left,) = torch.autograd.grad(first, layer.weight, retain_graph=True)
    (right,) = torch.autograd.grad(weight * second, layer.weight)
    torch.testing.assert_close(left.norm(), right.norm(), rtol=1e-4, atol=0)


def test_the_discriminator_learns_to_tell_and_the_generator_term_does_not_train_it() -> None:
    torch.manual_seed(0)
    config = AdversarialConfig(channels=32, num_layers=1, adaptive=False)
    adversary = Adversary(config, TokenizerOptimConfig(base_lr=1e-3), torch.device("cpu"))
    real, fake = torch.rand(8, 3, 8, 8), -torch.rand(8, 3, 8, 8)
    losses = []
    for _ in range(30):
        losses.append(float(adversary.accumulate(real, fake, share=1.0)))
        adversary.step(lr=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    copies = nn.Parameter(fake.clone())
    term, weight = adversary.generator_term(copies, copies.square().mean(), copies)
    term.backward(inputs=[copies])
    assert float(weight) == 1.0
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    # following the term makes the images look more real
    assert copies.grad is not None
    moved = fake - 10 * copies.grad
    assert adversary.discriminator(moved).mean() > adversary.discriminator(fake).mean()


def test_quantizer_dropout_belongs_to_positions(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, "codebook.dropout=0.25", "codebook.dropout_from=1")
    trainer = TokenizerTrainer(config, Tokenizer(config.tokenizer), 10, torch.device("cpu"))
    whole = trainer._num_scales(0, 4000)
    assert whole is not None
    for start, count in ((0, 7), (7, 13), (3990, 10)):
        part = trainer._num_scales(start, count)
        assert part is not None
        assert torch.equal(part, whole[start : start + count])
    shares = torch.bincount(whole, minlength=4) / 4000
    assert shares[0] == 0
    assert float(shares[3]) == pytest.approx(0.75, abs=0.03)
    assert float(shares[1]) == pytest.approx(0.125, abs=0.03)
    assert float(shares[2]) == pytest.approx(0.125, abs=0.03)


def save_backbone(path: Path, network: str) -> dict[str, torch.Tensor]:
    torchvision = pytest.importorskip("torchvision")
    model = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[network](weights=None)
    torch.save(model.state_dict(), path)
    return model.state_dict()


class TestPerceptual:
    def test_backbone_comes_from_the_file(self, tmp_path: Path) -> None:
        pytest.importorskip("lpips")
        state = save_backbone(tmp_path / "alex.pth", "alex")
        module = load_lpips("alex", tmp_path / "alex.pth")
        assert torch.equal(module.get_parameter("net.slice2.3.weight"), state["features.3.weight"])
        images = torch.rand(2, 3, 64, 64) * 2 - 1
        assert module(images, images).abs().max() < 1e-6
        noisy = (images + 0.2 * torch.randn_like(images)).requires_grad_()
        distance = module(noisy, images)
        assert distance.shape == (2, 1, 1, 1)
        assert (distance > 0).all()
        distance.sum().backward()
        assert noisy.grad is not None
        assert noisy.grad.abs().sum() > 0
        assert not any(parameter.requires_grad for parameter in module.parameters())

    def test_weights_of_another_network(self, tmp_path: Path) -> None:
        pytest.importorskip("lpips")
        save_backbone(tmp_path / "alex.pth", "alex")
        with pytest.raises(UserError, match=r"backbone_weights: .*alex\.pth: the weights do not fit"):
            load_lpips("vgg", tmp_path / "alex.pth")

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "lpips", None)
        with pytest.raises(UserError, match=r"needs the package lpips: pip install 'mepa_ds\[perceptual\]'"):
            load_lpips("vgg", tmp_path / "vgg.pth")

    def test_training_with_it(self, tmp_path: Path) -> None:
        pytest.importorskip("lpips")
        save_backbone(tmp_path / "alex.pth", "alex")
        tiny.make_data(tmp_path)
        perceptual = f"loss.perceptual={{network: alex, backbone_weights: {tmp_path / 'alex.pth'}}}"
        tokenizer = ["tokenizer.channel_multipliers=[1, 1, 1, 1, 1]"]  # 64 pixels: AlexNet halves five times
        tiny.train(tmp_path, perceptual, *tokenizer, "train.steps=2")
        assert Tokenizer.load(tmp_path / "run").config.image_side == 64
