"""What is chosen: by table where it is known to work, and by properties everywhere else."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mepa_ds.cli import quickstart
from mepa_ds.config.base import Section, load_config, parse_yaml, validate
from mepa_ds.config.changes import changed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data_tools.readers import Digits
from mepa_ds.errors import UserError
from mepa_ds.project.choosing.choices import Choices, train_images
from mepa_ds.project.choosing.choose import choose
from mepa_ds.project.choosing.planned import with_fitting_batches
from mepa_ds.project.choosing.small import GRIDS, SIZES
from mepa_ds.project.commands import shell_script, stages
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.digits import DIGITS_FACTS
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts
from mepa_ds.project.looking.opened import open_some
from mepa_ds.project.recipes import pretrain_recipe, tokenizer_recipe
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.on_request import FULL
from tests.tiny_run import ROOT


def facts(**values: Any) -> ImageFacts:
    """12 000 grey images of 28 pixels in ten classes, unless said otherwise."""
    words = ("imagefolder", "--root", "/images")
    own = ImageFacts(
        source="/images", kind="folder", train_words=words, heldout_words=(), classes=tuple("abcdefghij"),
        counts=(1200,) * 10, sides=(28, 28, 28), sizes={"17-32": 400}, num_opened=400,
        colour="grey",
    )  # fmt: skip
    return replace(own, **values)


IMAGENET = facts(
    source="/imagenet", heldout_words=("imagefolder", "--root", "/imagenet/val"), counts=(1281,) * 833 + (1282,) * 167,
    classes=tuple(f"n{number:08d}" for number in range(1000)), sides=(75, 375, 3000), colour="mixed",
)  # fmt: skip
PHOTOS = facts(counts=(60,) * 5, classes=tuple("abcde"), sides=(200, 380, 500), colour="colour")


def recipe(chosen: Choices, images: ImageFacts, layout: Layout | None = None) -> PretrainConfig:
    text = pretrain_recipe(chosen, images, layout or Layout())
    return validate(PretrainConfig, parse_yaml(text, "pretrain.yaml"), "pretrain.yaml")


def tokenizer(chosen: Choices, images: ImageFacts, layout: Layout | None = None) -> TokenizerTrainingConfig:
    text = tokenizer_recipe(chosen, images, layout or Layout())
    return validate(TokenizerTrainingConfig, parse_yaml(text, "tokenizer.yaml"), "tokenizer.yaml")


def differences(mine: Section, theirs: Section) -> dict[str, list[Any]]:
    return changed(json.loads(theirs.model_dump_json()), json.loads(mine.model_dump_json()))


def test_the_quickstarts_recipes_are_what_init_writes_for_the_digits() -> None:
    images, chosen, layout = quickstart.project()
    shipped = load_config(PretrainConfig, ROOT / quickstart.RECIPE)
    assert differences(recipe(chosen, images, layout), shipped) == {}
    shipped_tokenizer = load_config(TokenizerTrainingConfig, ROOT / quickstart.TOKENIZER_RECIPE)
    assert differences(tokenizer(chosen, images, layout), shipped_tokenizer) == {}


def test_what_is_known_of_the_digits_is_so() -> None:
    source = Digits("train").open(None)
    counts = [sum(source.label(number) == label for number in range(len(source))) for label in range(10)]
    assert tuple(counts) == DIGITS_FACTS.counts
    assert source.classes == DIGITS_FACTS.classes
    assert open_some(source).colour == DIGITS_FACTS.colour


def test_imagenet_on_eight_gpus_is_the_published_recipe() -> None:
    chosen = choose(IMAGENET, MachineFacts(gpus=8, gpu_gigabytes=80))
    if FULL:  # a trace of the whole model, half a minute
        chosen = with_fitting_batches(chosen, IMAGENET, MachineFacts(gpus=8, gpu_gigabytes=80), Layout())
        assert chosen.accumulation == 2
    mine = recipe(replace(chosen, accumulation=2), IMAGENET)
    found = differences(mine, load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml"))
    assert found.pop("output_dir") == ["runs/mepa_d16", "runs/pretrain"]
    for key, split in (("tokens", "train"), ("features", "train"), ("heldout_tokens", "heldout")):
        theirs, own = found.pop(f"data.{key}")
        assert own.rpartition(".")[2] == theirs.rpartition(".")[2]
        assert own.startswith(f"data/{split}.")
    assert found == {}


def test_the_line_for_a_cluster_names_the_recipes_paths_whole() -> None:
    """Jobs of a clone start in the clone, not in the project."""
    chosen = choose(IMAGENET, MachineFacts(gpus=8))
    script = shell_script(IMAGENET, chosen, Layout(), stages(IMAGENET, chosen, Layout())).replace("$PWD", "/here")
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("#   mepa slurm submit")))
    mine, whole = recipe(chosen, IMAGENET), dict(word.split("=") for word in words[words.index("--") + 1 :])
    named = {"output_dir": mine.output_dir, "tokenizer": mine.tokenizer} | {
        f"data.{key}": getattr(mine.data, key) for key in ("tokens", "features", "heldout_tokens")
    }
    assert whole == {key: f"/here/{path}" for key, path in named.items()}


@pytest.mark.parametrize(
    ("images", "machine", "wanted"),
    [
        (facts(), MachineFacts(), {"side": 32, "scales": (1, 2, 4, 8), "codebook_size": 128, "classifier": True}),
        (facts(sides=(8, 12, 16)), MachineFacts(), {"side": 32, "scales": (1, 2, 3, 4)}),
        (PHOTOS, MachineFacts(), {"side": 64, "codebook_size": 256, "guidance_until": None, "heldout": "split"}),
        (facts(sides=(64, 64, 64)), MachineFacts(gpus=1), {"side": 64, "preset": None, "ranks": 1}),
        (facts(sides=(150, 160, 170)), MachineFacts(gpus=2), {"side": 128, "scales": (1, 2, 3, 4, 5, 6, 8)}),
        (facts(sides=(300, 400, 500)), MachineFacts(gpus=4), {"side": 256, "preset": "mepa-d8", "ep_size": 4}),
        (facts(), MachineFacts(cores=1), {"ranks": 1, "ep_size": 1}),
        (facts(), MachineFacts(cores=16), {"ranks": 4, "threads": 4}),
        (facts(classes=("a",)), MachineFacts(), {"classifier": False}),
        (facts(counts=(1,) * 10), MachineFacts(), {"heldout": "none", "classifier": False}),
        (facts(counts=(4,) * 10), MachineFacts(), {"teacher": "none"}),
    ],
)
def test_choices_by_table(images: ImageFacts, machine: MachineFacts, wanted: dict[str, Any]) -> None:
    chosen = choose(images, machine)
    assert {name: getattr(chosen, name) for name in wanted} == wanted


def test_more_time_and_more_cores_are_used() -> None:
    short, long, wide = (choose(facts(), MachineFacts(cores=c), m) for c, m in ((2, 12), (2, 90), (8, 12)))
    assert short.size == SIZES[0]
    assert (long.size, wide.size) != (short.size, short.size)
    assert sum(short.seconds.values()) < sum(long.seconds.values())
    day = choose(facts(counts=(6000,) * 10), MachineFacts(cores=8), 24 * 60)
    assert day.size == SIZES[-1]


_IMAGES = st.builds(
    lambda num, classes, side, colour, given: facts(
        counts=tuple(max(num // (number + 1), 1) for number in range(classes)), classes=tuple(map(str, range(classes))),
        sides=(side, side, side), colour=colour, heldout_words=("imagefolder", "--root", "/val") if given else (),
    ),
    num=st.integers(1, 1_000_000),
    classes=st.integers(1, 300),
    side=st.integers(1, 3000),
    colour=st.sampled_from(["grey", "colour", "mixed"]),
    given=st.booleans(),
)  # fmt: skip
_MACHINES = st.builds(
    MachineFacts,
    cores=st.integers(1, 200),
    gflops=st.floats(0.5, 500),
    gpus=st.sampled_from([0, 0, 1, 2, 3, 5, 6, 8, 16, 64]),
)
_TEACHERS = st.sampled_from([None, "none", "patch-pca", "contrastive"])


@settings(max_examples=60, deadline=None)
@given(_IMAGES, _MACHINES, st.none() | st.floats(0.1, 10_000), _TEACHERS)
def test_every_choice_is_a_run(images: ImageFacts, machine: MachineFacts, minutes: float | None, teacher: Any) -> None:
    chosen = choose(images, machine, minutes, teacher=teacher)
    config = recipe(chosen, images)
    config.check_world(chosen.ranks)
    num_train = train_images(images, chosen.heldout, chosen.heldout_share)
    assert chosen.batch <= max(num_train, 1)
    assert config.train.num_steps(num_train) >= 1
    assert chosen.side % chosen.scales[-1] == 0
    assert config.model.scales == chosen.scales
    assert config.model.num_classes == len(images.classes)
    assert config.objective.alignment is None or max(config.objective.alignment.scales) <= len(chosen.scales)
    assert (config.data.heldout_tokens is None) == (chosen.heldout == "none")
    assert chosen.log_every > 0 < min(chosen.evaluate_every, chosen.checkpoint_every)
    if not chosen.is_published:
        made = tokenizer(chosen, images)
        made.check_world(chosen.ranks)
        assert made.tokenizer.image_side == chosen.side
        assert made.train.global_batch <= max(num_train, 1)
        for key in ("scales", "codebook_size", "code_width"):
            assert getattr(made.tokenizer, key) == getattr(config.model, key)
    commands = [command for stage in stages(images, chosen, Layout()) for command in stage.commands]
    assert any("pretrain.yaml" in command for command in commands)
    assert all(command.startswith("-m ") for command in commands)


def test_the_operations_of_tokenizers_are_those_that_are_counted() -> None:
    for name, grid in GRIDS.items():
        images = facts(sides=(8, 8, 8)) if name == "coarse-32" else facts() if name == "fine-32" else PHOTOS
        config = tokenizer(choose(images, MachineFacts()), images).tokenizer
        with torch.device("meta"):
            network = Tokenizer(config)
        assert config.scales == grid.scales
        pixels_BCHW = torch.zeros(1, 3, config.image_side, config.image_side, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.decoder(network.from_latent(network.to_latent(network.encoder(pixels_BCHW))))
        assert counter.get_total_flops() / 1e9 == pytest.approx(grid.gflop, rel=0.02)


@pytest.mark.parametrize(
    ("images", "machine", "given", "message"),
    [
        (facts(), MachineFacts(), {"minutes": 0.0}, "--minutes: expected more than 0, got 0"),
        (facts(), MachineFacts(), {"side": 48}, "--side: expected one of 32, 64, 128, 256, got 48"),
        (PHOTOS, MachineFacts(), {"side": 256}, "--side 256: tokens of such images are made on GPUs"),
        (facts(kind="ready_shards"), MachineFacts(), {"side": 64}, "hold squares of 28 pixels; leave it out"),
        (
            facts(kind="ready_shards", sides=(256, 256, 256)),
            MachineFacts(),
            {},
            r"the sets hold squares of 256 pixels, .* --gpus N, or smaller ones: mepa data build webdataset",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    images: ImageFacts, machine: MachineFacts, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(images, machine, **given)
