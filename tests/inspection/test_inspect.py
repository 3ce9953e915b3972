"""`mepa inspect` on a tiny run, on its weights alone and on a dense model; its numbers against others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mepa_ds.checkpoint.run_models import find_model
from mepa_ds.checkpoint.state import read_state
from mepa_ds.checkpoint.weights import export_checkpoint, read_projector, read_weights
from mepa_ds.cli.results import inspect as command
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import DataConfig, OnlineTeacher
from mepa_ds.data.images import images_once
from mepa_ds.errors import UserError
from mepa_ds.generation.class_names import caption, spread_classes
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import to_uint8
from mepa_ds.inspection.guidance import draw_guidance, guided_images
from mepa_ds.inspection.routing import expert_colours, routing_tiles
from mepa_ds.inspection.scales import sampled_scales
from mepa_ds.inspection.subject import Subject, open_subject
from mepa_ds.inspection.sweep import block_of, default_top_ks
from mepa_ds.inspection.tracing import (
    SampledInputs,
    Sampling,
    check_maker,
    choose_images,
    draw,
    held_out_tokens,
    labels_of,
    trace,
    trace_samples,
    trace_tokens,
)
from mepa_ds.models.block import Block, modulate
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.alignment import Projector, alignment_loss, cosine_maps
from mepa_ds.scales import ScaleSchedule
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from tests.ranks import finish
from tests.tiny_run import CLASSES, FEATURE_WIDTH, SCALES, make_run, recipe_values
from tests.train_tokenizer.training_run import make_images

CPU = torch.device("cpu")
ALL = ["--images", "8", "--batch-size", "5", "--sweep-cfg", "0", "2", "--sweep-top-k", "1", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on one rank, with a checkpoint and exported weights."""
    folder = tmp_path_factory.mktemp("inspected")
    recipe = make_run(folder, "train.steps=4", "log.checkpoint_every=4", "log.evaluate_every=4")
    finish([str(recipe)], 1, folder / "run.log")
    return folder / "run"


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    return open_subject(run, None, None, CPU)[0]


def listed(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "inspect.json").read_text())
    return found


def test_a_run_shows_everything(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(run), "--out", str(tmp_path), *ALL])
    said, index = capsys.readouterr().out, listed(tmp_path)
    names = [picture["picture"] for picture in index["pictures"]]
    routing = [f"routing_class{label:04d}.png" for label in range(CLASSES)]
    assert names[:2] == ["scales.png", "scales.gif"]
    others = ["expert_load.png", "router_entropy.png", "specialisation.png", "alignment.png", "sweep.png"]
    assert names[2:] == [*(name for name in routing if name in names), *others]
    assert len(names) > 7
    assert (index["step"], index["left_out"]) == (4, [])
    for picture in index["pictures"]:
        assert str(tmp_path / picture["picture"]) in said
        assert (tmp_path / picture["data"]).stat().st_size > 0
        with Image.open(tmp_path / picture["picture"]) as image:
            assert np.asarray(image.convert("L")).std() > 0
    with Image.open(tmp_path / "scales.gif") as moving:
        assert getattr(moving, "n_frames", 1) == len(SCALES)
    load = (tmp_path / "expert_load.csv").read_text().splitlines()
    assert load[0] == "step,block,scale,expert,load"
    assert len(load) == 1 + 4 * 2 * len(SCALES) * 4, "steps, blocks, scales, experts"
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [(cell["cfg"], cell["top_k"]) for cell in cells] == [(0, 1), (0, 16), (2, 1), (2, 16)]
    command.main([str(run), "--out", str(tmp_path), "--only", "scales"])
    assert {entry["picture"] for entry in listed(tmp_path)["pictures"]} == set(names), "those of before stay listed"
    command.main([str(run / "best"), "--out", str(tmp_path), "--only", "scales"])
    assert len(listed(tmp_path)["pictures"]) == 2, "of other weights they do not"


def test_weights_alone_show_what_they_can(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "elsewhere" / "weights", tmp_path / "out"
    shutil.copytree(run / "best", weights)
    config = json.loads((weights / "config.json").read_text())
    assert config.pop("id2label") == {"0": "0", "1": "1", "2": "2"}
    assert config.pop("label2id") == {"0": 0, "1": 1, "2": 2}
    (weights / "config.json").write_text(json.dumps(config))  # as earlier versions wrote it
    with pytest.raises(UserError, match=r"--tokenizer: .*weights does not tell its tokenizer; give its directory"):
        command.main([str(weights)])
    shutil.copy(run / "resolved.yaml", weights.parent)
    recipe = weights.parent / "resolved.yaml"
    recipe.write_text(recipe.read_text().replace(str(run.parent / "tokenizer"), "runs/tokenizer"))
    with pytest.raises(UserError, match=r"--tokenizer: runs/tokenizer, which the run names, is not there; start in"):
        command.main([str(weights)])
    recipe.unlink()
    tokenizer = ["--tokenizer", str(run.parent / "tokenizer")]
    command.main([str(weights), *tokenizer, "--out", str(out), *ALL])
    left_out = listed(out)["left_out"]
    assert [line.partition(":")[0] for line in left_out] == [
        "class names",
        "expert load over training",
        "teacher alignment",
    ]
    assert "exported weights have no projector" in left_out[2]
    said = capsys.readouterr().out
    assert all(f"left out: {line}\n" in said for line in left_out)


def test_a_dense_model_has_no_experts(tmp_path: Path, run: Path) -> None:
    values = {**recipe_values(tmp_path)["model"], "moe": None}
    NextScaleTransformer(validate(ModelConfig, values, "model")).save_pretrained(tmp_path / "dense")
    options = ["--tokenizer", str(run.parent / "tokenizer"), "--out", str(tmp_path / "out"), "--classes", "1", *ALL]
    command.main([str(tmp_path / "dense"), *options])
    found = listed(tmp_path / "out")
    assert [picture["picture"] for picture in found["pictures"]] == ["scales.png", "scales.gif", "sweep.png"]
    assert sum("the model is dense" in line for line in found["left_out"]) == 3


def test_what_cannot_be_inspected(run: Path, tmp_path: Path) -> None:
    for options, message in [
        ([str(tmp_path / "nothing"), "--tokenizer", str(run.parent / "tokenizer")], "nothing"),
        ([str(run), "--images", "0"], "--images: expected at least 1, got 0"),
        ([str(run), "--only"], "--only: name at least one of scales, routing"),
        ([str(run), "--classes", "9", "--out", str(tmp_path)], "goes beyond the model's classes 0..2"),
    ]:
        with pytest.raises(UserError, match=message):
            command.main(options)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="a run without a checkpoint or exported weights"):
        command.main([str(tmp_path / "run")])
    shutil.copytree(run / "checkpoints/step_00000004", tmp_path / "run/checkpoints/step_00000004")
    shard = next((tmp_path / "run/checkpoints/step_00000004").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="step_00000004: damaged: "):
        command.main([str(tmp_path / "run")])


def test_another_tokenizers_tokens_are_refused(subject: Subject, run: Path, tmp_path: Path) -> None:
    from tests.tiny_run import make_sets

    make_sets(tmp_path, "another", count=4)
    with pytest.raises(UserError, match="made by tokenizer 'tiny' \\(another\\)"):
        check_maker(subject, tmp_path / "train.tokens")
    with pytest.raises(UserError, match="has label 2, but the model's classes are 0 to 1"):
        labels_of(run.parent / "train.tokens", 2)


def test_a_sorted_set_gives_images_of_many_classes() -> None:
    labels = np.arange(1000).repeat(50)
    chosen = labels[choose_images(labels, [207, 999], 256)]
    classes, counts = np.unique(chosen, return_counts=True)
    assert len(classes) == 32
    assert set(counts) == {8}
    assert {207, 999} < set(classes)
    assert np.diff(classes).max() < 70, "spread over all"
    few = labels[choose_images(labels, [7], 3)]
    assert len(set(few)) == 3
    assert 7 in few
    of_ten = choose_images(np.arange(300) % 10, [1], 256)
    assert np.unique(np.arange(300)[of_ten] % 10, return_counts=True)[1].tolist() == [25] * 10


def test_tokens_are_read_by_number(subject: Subject, run: Path) -> None:
    tokens = run.parent / "heldout.tokens"
    labels = labels_of(tokens, CLASSES)
    whole = trace_tokens(subject, tokens, list(range(10)), 10, lambda count: None)
    some = trace_tokens(subject, tokens, [1, 4, 8], 2, lambda count: None)
    assert np.array_equal(whole.labels_B, labels)
    assert np.array_equal(some.labels_B, labels[[1, 4, 8]])
    assert np.array_equal(some.pixels_BHW3, whole.pixels_BHW3[[1, 4, 8]])
    assert np.array_equal(some.layers[1].first_BL, whole.layers[1].first_BL[[1, 4, 8]])


def test_the_checkpoint_gives_model_and_projector(subject: Subject, run: Path) -> None:
    assert subject.checkpoint is not None
    last = NextScaleTransformer.load(run / "last").state_dict()
    found = read_weights(subject.checkpoint, subject.model.config)
    assert found.keys() == last.keys()
    assert all(torch.equal(found[name], last[name]) for name in last)
    state = read_projector(subject.checkpoint)
    assert state is not None
    Projector(subject.model.config.C, 32, FEATURE_WIDTH).load_state_dict(state)


def test_choices_are_those_of_the_routers(subject: Subject) -> None:
    """Of the first block by hand; of all blocks by the statistics that training records."""
    model, schedule = subject.model, subject.model.schedule
    labels = torch.tensor([0, 2])
    inputs = subject.tokenizer.inputs_from_tokens(torch.randint(0, 16, (2, schedule.num_tokens)))
    layers = trace(model, labels, inputs)
    with torch.no_grad():
        statistics = model(labels, inputs).routing
        class_BC = model.class_embed(labels)
        x = torch.cat([model.first_input(class_BC), *_later_inputs(model, inputs)], dim=1)
        block = cast(Block, model.blocks[0])
        gamma1, _, scale1, scale2, shift1, shift2 = block.modulation(model.condition(class_BC)).unbind(2)
        x = x + gamma1 * block.attention(modulate(x, scale1, shift1), schedule.bounds, None)
        routing = cast(MoEFeedForward, block.ffn).router(
            modulate(x, scale2, shift2).flatten(0, 1), schedule.scale_index_L()
        )
    first = routing.probs_TE.argmax(-1).view(2, -1).numpy()
    assert np.array_equal(layers[0].first_BL, first)
    for index, layer in layers.items():
        for scale, (start, end) in enumerate(schedule.bounds):
            counts = layer.chosen_BLE[:, start:end].sum((0, 1))
            assert np.array_equal(counts, statistics[index].counts_SE[scale].numpy())
            entropy = float(layer.entropy_BL[:, start:end].sum())
            assert entropy == pytest.approx(float(statistics[index].entropy_sum_S[scale]), rel=1e-5)


def _later_inputs(model: NextScaleTransformer, inputs: torch.Tensor) -> list[torch.Tensor]:
    lengths = model.schedule.lengths[1:]
    return [model.next_input(part, scale) for scale, part in enumerate(inputs.split(lengths, dim=1), start=1)]


def test_maps_have_the_colours_of_the_experts() -> None:
    schedule, colours = ScaleSchedule((1, 2)), expert_colours(4)
    white = np.full((6, 6, 3), 255, np.uint8)
    ((image, coarse, fine),) = routing_tiles(white, np.array([[2, 0, 1, 3, -1]], np.int16), schedule, colours)
    assert (image == 255).all()
    assert (coarse == coarse[0, 0]).all()
    over_white = [np.round(255 * 0.35 + 0.65 * np.array(colour)) for colour in [*colours, (255, 255, 255)]]
    assert np.abs(coarse[0, 0] - over_white[2]).max() <= 1
    corners = [fine[0, 0], fine[0, -1], fine[-1, 0], fine[-1, -1]]
    for corner, expected in zip(corners, [over_white[e] for e in (0, 1, 3, 4)], strict=True):
        assert np.abs(corner - expected).max() <= 1
    for count in (8, 10, 16, 64):
        assert len(set(expert_colours(count))) == count


def test_partial_sums_end_in_the_image(subject: Subject) -> None:
    sampling = Sampling(seed=3)
    steps = sampled_scales(subject, [0, 1, 2], sampling)
    assert steps.shape[:2] == (len(SCALES), 3)
    assert np.array_equal(steps[-1], to_uint8(sample(subject.model, subject.tokenizer, [0, 1, 2], seed=3)))
    tokens = torch.randint(0, 16, (2, 14))
    *earlier, last = subject.tokenizer.decode_scales(tokens)
    assert torch.equal(last, subject.tokenizer.decode(tokens))
    quantizer = subject.tokenizer.quantizer
    coarse = quantizer.add_scale(quantizer.empty_f_hat(2), tokens[:, :1], 0)
    assert torch.equal(earlier[0], subject.tokenizer.decode_f_hat(coarse))


def test_samples_are_routed_with_their_own_tokens(subject: Subject) -> None:
    """The inputs gathered while sampling are those that the sampler gave the model; batches do not matter."""
    gathered = SampledInputs(subject)
    seen: list[torch.Tensor] = []
    hook = subject.model.word_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    draw(subject, [0, 1], Sampling(cfg=0), on_scale=gathered)
    hook.remove()
    assert torch.equal(gathered.inputs_BLZ(), torch.cat(seen, dim=1))
    whole, parts = (
        trace_samples(subject, [0, 1, 2, 0], Sampling(batch_size=size), lambda count: None) for size in (4, 3)
    )
    assert np.array_equal(whole.pixels_BHW3, parts.pixels_BHW3)
    assert np.array_equal(whole.layers[1].first_BL, parts.layers[1].first_BL)


def test_cosines_are_the_losses(subject: Subject) -> None:
    schedule = subject.model.schedule
    z, features = torch.randn(2, schedule.num_tokens, 6), torch.randn(2, 9, 6)
    maps = torch.stack(list(cosine_maps(z, features, schedule, range(1, len(SCALES) + 1))), dim=1)
    assert maps.shape == (2, len(SCALES), 9)
    loss = alignment_loss(z, features, schedule, [2, 3])
    torch.testing.assert_close(-maps[:, 1:].mean((0, 2)).sum(), loss)


def test_weights_in_a_run_know_its_data(run: Path, tmp_path: Path) -> None:
    found, notes = open_subject(run / "best", None, None, CPU)
    assert (found.run, found.checkpoint, found.step, notes) == (run, None, 4, [])
    assert found.class_names == ("0", "1", "2")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert read_state(checkpoint).class_names == ["0", "1", "2"]
    export_checkpoint(checkpoint, tmp_path / "exported")
    assert (tmp_path / "exported/config.json").read_bytes() == (run / "best/config.json").read_bytes()
    with pytest.raises(UserError, match="holds 'tokenizer'"):
        open_subject(run.parent / "tokenizer", run.parent / "tokenizer", None, CPU)


def test_data_that_have_gone_are_named(subject: Subject, run: Path, tmp_path: Path) -> None:
    assert subject.recipe is not None
    gone = subject.recipe.data.model_copy(update={"features": tmp_path / "x", "heldout_tokens": tmp_path / "y"})
    moved = replace(subject, recipe=subject.recipe.model_copy(update={"data": gone}))
    line = draw_guidance(moved, [0, 1], tmp_path)
    assert line == f"teacher alignment: data.features of the run, {tmp_path / 'x'}, is not there any more"
    tokens, note = held_out_tokens(moved)
    assert tokens is None
    assert note is not None
    assert note.startswith(f"held-out images: {tmp_path / 'y'} is not there any more")


def test_a_teacher_beside_the_model_is_asked_again(subject: Subject, tmp_path: Path) -> None:
    """Recipes with data.images keep no features: the teacher gives them once more."""
    make_images(tmp_path / "images", count=5)
    teacher = PatchPca(PatchPcaConfig(grid_side=3, pixels_per_cell=4, window=4, width=FEATURE_WIDTH))
    teacher.projection.normal_()
    teacher.save(tmp_path / "teacher")
    online = OnlineTeacher(name="patch-pca", weights=str(tmp_path / "teacher"))
    data = DataConfig(images=tmp_path / "images", teacher=online)
    assert subject.recipe is not None
    images = guided_images(subject, subject.recipe.model_copy(update={"data": data}), [0, 1])
    assert images is not None
    assert images.labels_B.tolist() == [0], "these images are all of class 0"
    (first, *_) = images_once(tmp_path / "images", batch_size=1, image_side=6)
    torch.testing.assert_close(
        images.features_BNP, PatchPca.load(tmp_path / "teacher").patch_features(first.images_B3HW)
    )
    assert torch.equal(images.tokens_BL, subject.tokenizer.encode(first.images_B3HW))


def test_names_of_classes(run: Path, tmp_path: Path) -> None:
    assert [caption(label, ("Shirt", "1")) for label in range(3)] == ["0 Shirt", "class 1", "class 2"]
    assert spread_classes(1000, 8) == [0, 125, 250, 375, 500, 625, 750, 875]
    assert spread_classes(3, 8) == [0, 1, 2]
    assert find_model(run / "best").names_of_data() == ("0", "1", "2")
    assert find_model(tmp_path / "weights").names_of_data() == ()


def test_tiles_of_a_sweep() -> None:
    assert default_top_ks(4096) == (1, 100, 900, 4096)
    assert default_top_ks(128) == (1, 8, 32, 128)
    images = np.stack([np.full((4, 4, 3), number, np.uint8) for number in range(3)])
    tile = block_of(images)
    assert tile.shape == (9, 9, 3)
    assert [int(tile[top, left, 0]) for top, left in ((0, 0), (0, 5), (5, 0))] == [0, 1, 2]
    assert (tile[4] == 160).all()


def test_expert_choice_may_leave_positions_without_an_expert(subject: Subject) -> None:
    model = subject.model
    values = {**model.config.model_dump(), "moe": {"num_experts": 4, "router": "expert_choice", "top_k": 1}}
    other = NextScaleTransformer(validate(ModelConfig, values, "model")).eval()
    inputs = subject.tokenizer.inputs_from_tokens(torch.randint(0, 16, (2, 14)))
    layers = trace(other, torch.tensor([0, 1]), inputs)
    for layer in layers.values():
        without = ~layer.chosen_BLE.any(-1)
        assert np.array_equal(without, layer.first_BL == -1)
        taken = layer.first_BL[~without]
        assert layer.chosen_BLE[~without][np.arange(len(taken)), taken].all()
    assert replace(subject, model=other).blocks == [0, 1]
