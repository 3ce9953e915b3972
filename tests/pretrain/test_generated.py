"""Scores of generated images during training: the same on any number of ranks, once a step, with their protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds import distributed
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import ScoreConfig
from mepa_ds.errors import UserError
from mepa_ds.evaluation.scorer import Scorer, ScorerOptions
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import save_png, to_uint8
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.pretrain.evaluation.generated import GeneratedScores
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.forked import CONTEXT
from tests.ranks import finish, refused
from tests.tiny_run import CLASSES, CODE_WIDTH, CODEBOOK, SCALES, free_port, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, 30 real images and a fitted patch-pca."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, "train.steps=4", "log.evaluate_every=2", "log.checkpoint_every=2")
    side = Tokenizer.load(folder / "tokenizer").config.image_side
    rng = np.random.default_rng(0)
    for number in range(30):
        save_png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), folder / f"real/{number:02d}.png")
    config = PatchPcaConfig(grid_side=2, pixels_per_cell=4, window=4, width=3)
    PatchPca.fit([torch.rand(20, 3, 8, 8) * 2 - 1], config).save(folder / "teacher")
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"reference": str(folder / "real"), "images": 11, "features": [f"patch-pca:{folder / 'teacher'}"]}
    return values | {"batch": 4, "cfg": 1.0, "top_k": 0, "top_p": 0.0} | changes


def model_of() -> NextScaleTransformer:
    config = ModelConfig(
        depth=1, width=16, num_heads=1, num_classes=CLASSES, scales=SCALES, codebook_size=CODEBOOK,
        code_width=CODE_WIDTH, head_init=1.0,
    )  # fmt: skip
    model = NextScaleTransformer(config)
    model.init_weights(0)
    return model.eval()


def take(folder: Path, rank: int, count: int, port: int, results: Any) -> None:
    if count > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    score = ScoreConfig.model_validate(settings(folder), strict=False)
    generated = GeneratedScores(score, Tokenizer.load(folder / "tokenizer"), CLASSES, 3, lambda: None)
    scores = generated.take(model_of(), lambda: None)
    results.put((count, rank, scores, generated.line(scores)))
    distributed.stop()


def test_scores_do_not_depend_on_the_number_of_ranks(folder: Path) -> None:
    results, port = CONTEXT.Queue(), free_port()
    ranks = [(0, 1, 0), *((rank, 2, port) for rank in range(2))]
    processes = [CONTEXT.Process(target=take, args=(folder, *place, results), daemon=True) for place in ranks]
    for process in processes:
        process.start()
    told = [results.get(timeout=200) for _ in ranks]
    found = {(count, rank): scores for count, rank, scores, _ in told}
    for process in processes:
        process.join()
    assert found[1, 0] == found[2, 0]
    assert found[2, 1] == {}
    scores = found[1, 0]
    labels = [number * CLASSES // 11 for number in range(11)]
    images = sample(
        model_of(), Tokenizer.load(folder / "tokenizer"), labels, cfg=1.0, top_k=0, top_p=0.0, seed=3, batch_size=4
    )
    options = ScorerOptions(features=tuple(settings(folder)["features"]), seed=3)
    scorer = Scorer.open(folder / "real", options, images.shape[-1])
    expected = scorer.score(scorer.features(to_uint8(images)), labels)
    assert {name: value for name, value in scores.items() if name != "protocol"} == {
        name: value for name, value in expected.items() if name != "protocol"
    }
    assert scores["protocol"]["sampling"] == {"images": 11, "batch": 4, "cfg": 1.0, "top_k": 0, "top_p": 0.0}
    assert scores["protocol"]["classes"]["balanced"] is False
    assert all("patch-pca.fd" in line for _, rank, _, line in told if rank == 0)


def test_a_run_records_its_scores_once_a_step(folder: Path) -> None:
    given = [f"log.score.{key}={value}" for key, value in settings(folder).items() if key != "features"]
    features = f"log.score.features=['patch-pca:{folder / 'teacher'}']"
    words = [str(folder / "recipe.yaml"), f"output_dir={folder / 'scored'}", "log.score_every=3", *given, features]
    said = finish(words, 2, folder / "scored.log")
    for _ in range(2):
        records = [r for r in read_metrics(folder / "scored/metrics.jsonl") if r["event"] == "score"]
        assert [record["step"] for record in records] == [3, 4], "also after the last step"
        assert records[0]["patch-pca.fd"] != records[1]["patch-pca.fd"]
        finish(words, 1, folder / "again.log")  # a finished run is scored no more
    assert "step 4  11 generated images: patch-pca.fd" in said


def test_what_cannot_be_scored_is_said_before_the_first_step(folder: Path) -> None:
    every = "log.score_every=2"
    assert "score_every needs log.score" in refused(folder, "none", every)
    nowhere = f"log.score.reference={folder / 'nowhere'}"
    pca = f"log.score.features=['patch-pca:{folder / 'teacher'}']"
    assert "nowhere" in refused(folder, "nowhere", every, nowhere, pca)
    inception = refused(folder, "inception", every, f"log.score.reference={folder / 'real'}")
    assert "needs log.score.inception" in inception
    rng = np.random.default_rng(0)
    np.savez(folder / "small.npz", rng.integers(0, 256, (9, 7, 7, 3), dtype=np.uint8))
    np.save(folder / "rows.npy", rng.normal(size=(11, 4)))
    for changes, message in (
        ({"reference": str(folder / "small.npz")}, r"small.npz: images of 7 x 7 pixels, but this run generates"),
        ({"features": [f"{folder}/rows.npy:{folder}/rows.npy"]}, "rows is a file of features, which are not of images"),
    ):
        score = ScoreConfig.model_validate(settings(folder, **changes), strict=False)
        with pytest.raises(UserError, match=message):
            GeneratedScores(score, Tokenizer.load(folder / "tokenizer"), CLASSES, 0, lambda: None)
    bad = ScoreConfig.model_validate(settings(folder, reference=str(folder / "nowhere")), strict=False)
    with pytest.raises(UserError, match=r"log\.score: .*nowhere"):
        GeneratedScores(bad, Tokenizer.load(folder / "tokenizer"), CLASSES, 0, lambda: None)
