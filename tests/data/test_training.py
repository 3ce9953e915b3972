"""The training loader: joined, exact, elastic; and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.data.options import LoaderOptions, grouped
from mepa_ds.data.order import subset_of
from mepa_ds.data.prefetch import BufferPool, ordered_map
from mepa_ds.data.shards.index import INDEX_NAME, MadeBy
from mepa_ds.data.shards.writer import Manifest, ShardWriter, npy_bytes
from mepa_ds.data.training import TrainingBatch, evaluation_batches, training_batches
from mepa_ds.data.training_sets import open_training_sets
from mepa_ds.data.views import Views, choose_views, sample_boxes
from mepa_ds.distributed import Ranks
from mepa_ds.errors import UserError
from tests.data.shard_fixtures import CLASSES, features_of, make_set, tokens_of

SIZES = (7, 4, 0, 12)
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    make_set(root / "tokens", "tokens", SIZES)
    make_set(root / "features", "features", SIZES)
    return root / "tokens", root / "features"


def take(count: int, sets: tuple[Path, Path | None], **options: Any) -> list[TrainingBatch]:
    defaults = {"global_batch": 6, "seed": 2}
    return list(itertools.islice(training_batches(*sets, **grouped({**defaults, **options})), count))


def assert_batch_is_its_samples(batch: TrainingBatch) -> None:
    numbers = [int(key) for key in batch.keys]
    assert batch.tokens_BL.tolist() == [tokens_of(number).tolist() for number in numbers]
    assert batch.tokens_BL.dtype == torch.int64
    assert batch.labels_B.tolist() == [number % 5 for number in numbers]
    expected = np.stack([features_of(number) for number in numbers]) * np.float32(0.5)
    assert batch.features_BNC is not None
    np.testing.assert_array_equal(batch.features_BNC.numpy(), expected)


def test_batches_join_what_belongs_together(sets: tuple[Path, Path]) -> None:
    for batch in take(9, sets):
        assert_batch_is_its_samples(batch)
        assert batch.weight_B.tolist() == [1] * 6
    assert [batch.next_position for batch in take(3, sets)] == [6, 12, 18]
    assert take(1, (sets[0], None))[0].features_BNC is None


def test_held_batches_keep_their_content(sets: tuple[Path, Path]) -> None:
    """Memory is used again only after a batch, and every tensor taken from it, is gone."""
    batches = training_batches(*sets, global_batch=6, seed=2, options=LoaderOptions(num_workers=2))
    views = [next(batches).tokens_BL[1:3].clone() for _ in range(20)]
    kept = [batch.tokens_BL[1:3] for batch in itertools.islice(training_batches(*sets, global_batch=6, seed=2), 20)]
    assert all(torch.equal(a, b) for a, b in zip(views, kept, strict=True))


@given(
    legs=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=30)
def test_any_world_sizes_workers_and_interruptions_read_the_same_stream(
    sets: tuple[Path, Path], legs: list[tuple[int, int, int, int]]
) -> None:
    """Legs of (ranks, share of a rank, steps, workers), each resumed from the position that the last one left."""
    position, seen = 0, list[str]()
    for world_size, share, steps, workers in legs:
        options = {"global_batch": world_size * share, "position": position, "num_workers": workers}
        ranks = [take(steps, sets, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for batches in zip(*ranks, strict=True):
            assert len({batch.next_position for batch in batches}) == 1
            seen += [key for batch in batches for key in batch.keys]
            position = batches[0].next_position
    straight = itertools.chain.from_iterable(batch.keys for batch in training_batches(*sets, global_batch=1, seed=2))
    assert seen == list(itertools.islice(straight, len(seen)))
    for start in range(0, len(seen) - TOTAL + 1, TOTAL):
        assert len(set(seen[start : start + TOTAL])) == TOTAL


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_a_subset_is_read_again_and_again_by_any_ranks(sets: tuple[Path, Path], ranks: int, workers: int) -> None:
    """Ten images of 23, six a step: each of them once in every ten positions, and no other one."""
    options = {"unique_images": 10, "num_workers": workers}
    by_rank = [take(10, sets, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    seen = [key for batches in zip(*by_rank, strict=True) for batch in batches for key in batch.keys]
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    subset = [f"{number:09d}" for number in subset_of(2, TOTAL, 10)]
    assert all(sorted(epoch) == subset for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    for batch in by_rank[0]:
        assert_batch_is_its_samples(batch)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (4, 3), (1, 5), (50, 2), (2, 1), (11, 2)])
def test_evaluation_counts_each_sample_once_in_step(sets: tuple[Path, Path], batch_size: int, world_size: int) -> None:
    ranks = [
        list(evaluation_batches(*sets, batch_size=batch_size, ranks=Ranks(rank, world_size)))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [
        key
        for batches in ranks
        for batch in batches
        for key, weight in zip(batch.keys, batch.weight_B.tolist(), strict=True)
        if weight
    ]
    assert sorted(counted) == [f"{number:09d}" for number in range(TOTAL)]
    for batch in itertools.chain(*ranks):
        assert len(batch.keys) == batch_size
        assert_batch_is_its_samples(batch)


def write_views(root: Path) -> tuple[Path, Path, Path]:
    """Tokens of 3 random crops, features of each crop, and maps of whole images."""
    view = Views(side=16, count=3)
    names = ("shard-000000.tar",)
    token_settings = {"scales": [1], "codebook_size": 4096, **view.settings}
    feature_settings = {"codec": "fp16", "width": 2, **view.settings}
    whole_settings = {"codec": "fp16", "width": 2, "views": "whole", "grid_side": 2}
    rng = np.random.default_rng(0)
    for name, kind, settings_ in (
        ("tokens", "tokens", token_settings),
        ("features", "features", feature_settings),
        ("whole", "features", whole_settings),
    ):
        manifest = Manifest(kind=kind, shard_names=names, classes=CLASSES, made_by=MadeBy(name="t", settings=settings_))  # type: ignore[arg-type]
        writer = ShardWriter(root / name, manifest)
        samples = []
        for number in range(8):
            if name == "tokens":
                codes = np.array([[number * 10 + v] for v in range(3)], np.uint16)
                low = rng.random((3, 2)) * 0.4
                boxes = np.concatenate([low, low + 0.5], axis=1).astype(np.float32)
                members = {"tokens.npy": npy_bytes(codes), "box.npy": npy_bytes(boxes), "cls": b"0"}
            elif name == "features":
                maps = np.array([np.full((4, 2), number * 10 + v) for v in range(3)], np.float16)
                members = {"features.npy": npy_bytes(maps)}
            else:
                members = {"features.npy": npy_bytes(rng.standard_normal((3, 3, 2)).astype(np.float16))}
            samples.append((f"{number:09d}", members))
        writer.write_shard(names[0], samples)
        writer.finish()
    return root / "tokens", root / "features", root / "whole"


def test_tokens_and_features_of_one_view_go_together(tmp_path: Path) -> None:
    tokens, features, _ = write_views(tmp_path)
    assert open_training_sets(tokens, features).num_views == 3
    seen = set()
    for batch in take(40, (tokens, features), global_batch=4):
        codes, values = batch.tokens_BL[:, 0], batch.features_BNC
        assert values is not None
        assert (values == codes[:, None, None]).all()
        assert [int(key) for key in batch.keys] == (codes // 10).tolist()
        seen |= set(codes.tolist())
    assert len(seen) == 24  # every view of every sample comes up
    assert [b.tokens_BL.tolist() for b in take(5, (tokens, features), position=12)] == [
        b.tokens_BL.tolist() for b in take(7, (tokens, features))[2:]
    ]
    for seed in (3, 4):
        batches = itertools.islice(training_batches(tokens, None, global_batch=8, seed=seed, position=40), 5)
        views = np.concatenate([batch.tokens_BL[:, 0].numpy() % 10 for batch in batches])
        assert views.tolist() == choose_views(seed, np.arange(40, 80), 3).tolist(), "the run's own seed decides"
    (first,) = evaluation_batches(tokens, features, batch_size=8)
    assert (first.tokens_BL[:, 0] % 10 == 0).all()


def test_whole_maps_are_read_at_the_boxes_of_the_tokens(tmp_path: Path) -> None:
    tokens, _, whole = write_views(tmp_path)
    opened = open_training_sets(tokens, whole)
    assert opened.whole_maps
    assert opened.feature_grid_side == 2
    assert opened.features is not None
    for batch in take(5, (tokens, whole), global_batch=4):
        for row, key in enumerate(batch.keys):
            view = int(batch.tokens_BL[row, 0]) % 10
            boxes = np.empty((1, 3, 4), np.float32)
            opened.tokens.read_arrays(np.array([int(key)]), "box.npy", boxes)
            stored = np.empty((1, 3, 3, 2), np.float16)
            opened.features.read_arrays(np.array([int(key)]), "features.npy", stored)
            expected = sample_boxes(torch.from_numpy(stored).float(), torch.from_numpy(boxes[:, view]), 2)
            assert batch.features_BNC is not None
            torch.testing.assert_close(batch.features_BNC[row], expected[0])


def test_facts_that_a_run_checks(sets: tuple[Path, Path]) -> None:
    opened = open_training_sets(*sets)
    assert (opened.num_samples, opened.num_classes, opened.num_views) == (TOTAL, 5, 1)
    assert (opened.scales, opened.codebook_size, opened.tokenizer.identity) == ((1, 2), 64, "0123")
    assert opened.teacher is not None
    assert (opened.teacher.identity, opened.feature_width, opened.feature_grid_side) == ("0123", 6, 2)


def test_mismatched_siblings_are_refused(sets: tuple[Path, Path], tmp_path: Path) -> None:
    make_set(tmp_path / "other", "features", (7, 5, 0, 12))
    with pytest.raises(UserError, match=r"tokens.*features.*\(24 samples\).*run mepa data precompute again"):
        training_batches(sets[0], tmp_path / "other", global_batch=6, seed=0)
    with pytest.raises(UserError, match=r"data\.tokens: .*holds features .*, not tokens"):
        training_batches(sets[1], None, global_batch=6, seed=0)
    with pytest.raises(UserError, match=r"data\.features: .*holds tokens"):
        training_batches(sets[0], sets[0], global_batch=6, seed=0)
    with pytest.raises(UserError, match=r"data\.features: .*missing: no such directory"):
        training_batches(sets[0], tmp_path / "missing", global_batch=6, seed=0)
    with pytest.raises(UserError, match="global batch 7 does not divide among 2 ranks"):
        training_batches(*sets, global_batch=7, seed=0, ranks=Ranks(0, 2))
    for name, images in (("ours", "a"), ("same", "a"), ("theirs", "b")):  # keys are places, the same in any dataset
        make_set(tmp_path / name, "tokens" if name == "ours" else "features", SIZES, images=images)
    training_batches(tmp_path / "ours", tmp_path / "same", global_batch=6, seed=0)
    with pytest.raises(UserError, match=r"ours .* and .*theirs .*are not made from the same images"):
        training_batches(tmp_path / "ours", tmp_path / "theirs", global_batch=6, seed=0)
    make_set(tmp_path / "views", "features", SIZES, views="random:2", views_seed=0, image_side=8)
    with pytest.raises(UserError, match="different parts of the images"):
        training_batches(sets[0], tmp_path / "views", global_batch=6, seed=0)
    make_set(tmp_path / "bare", "tokens", SIZES)
    index = json.loads((tmp_path / "bare" / INDEX_NAME).read_text())
    del index["made_by"]["settings"]["scales"]
    (tmp_path / "bare" / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not say 'scales'"):
        training_batches(tmp_path / "bare", None, global_batch=6, seed=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_stops_or_is_replaced(tmp_path: Path, num_workers: int) -> None:
    """Codes outside the codebook: what a flipped bit in a token map looks like."""
    make_set(tmp_path / "tokens", "tokens", SIZES)
    make_set(tmp_path / "features", "features", SIZES)
    path = tmp_path / "tokens" / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(tokens_of(8).tobytes(), np.full(5, 999, np.uint16).tobytes()))
    directories = (tmp_path / "tokens", tmp_path / "features")
    with pytest.raises(UserError, match="sample '000000008' has codes outside the codebook of 64"):
        take(5, directories, num_workers=num_workers)
    whole = take(5, directories, num_workers=num_workers, on_damaged="skip")
    assert sum(len(batch.damaged) for batch in whole) in (1, 2)
    assert all("000000008" not in batch.keys for batch in whole)
    for batch in whole:
        assert_batch_is_its_samples(batch)
    ranks = [take(5, directories, rank=r, world_size=3, on_damaged="skip") for r in range(3)]
    for step, batch in enumerate(whole):
        assert tuple(key for rank in ranks for key in rank[step].keys) == batch.keys


def damage_codes(directory: Path, number: int) -> None:
    """Codes outside the codebook."""
    for path in directory.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(tokens_of(number).tobytes(), np.full(5, 999, np.uint16).tobytes()))


def test_a_set_without_one_whole_sample_ends_the_search(tmp_path: Path) -> None:
    make_set(tmp_path / "tokens", "tokens", SIZES)
    make_set(tmp_path / "features", "features", SIZES)
    for number in range(TOTAL):
        damage_codes(tmp_path / "tokens", number)
    with pytest.raises(UserError, match="tokens: no sample of the set can be read; make it again"):
        take(1, (tmp_path / "tokens", tmp_path / "features"), on_damaged="skip")


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_leaves_damaged_samples_out_and_counts_them(tmp_path: Path, world_size: int) -> None:
    make_set(tmp_path, "tokens", SIZES)
    for number in (8, 9, TOTAL - 1):  # two in a row, and the last, which fills up batches
        damage_codes(tmp_path, number)
    with pytest.raises(UserError, match="'000000008' has codes outside"):
        list(evaluation_batches(tmp_path, None, batch_size=5))
    batches = [
        batch
        for rank in range(world_size)
        for batch in evaluation_batches(
            tmp_path, None, batch_size=5, ranks=Ranks(rank, world_size), options=LoaderOptions(on_damaged="skip")
        )
    ]
    rows = [row for batch in batches for row in zip(batch.keys, batch.weight_B.tolist(), strict=True)]
    counted = sorted(int(key) for key, weight in rows if weight)
    assert counted == [number for number in range(TOTAL) if number not in (8, 9, TOTAL - 1)]
    assert sum(len(batch.damaged) for batch in batches) == 3


def test_the_view_that_is_tried_is_the_one_that_is_read(tmp_path: Path) -> None:
    """A sample with one damaged view is a fit substitute exactly where another view is wanted."""
    tokens, features, _ = write_views(tmp_path)
    path = tokens / "shard-000000.tar"
    for number, view in ((3, 0), (4, 1), (5, 2), (6, 0)):
        good, bad = (np.array([[code]], np.uint16).tobytes() for code in (number * 10 + view, 60_000))
        content = path.read_bytes()
        start = content.index(npy_bytes(np.array([[number * 10 + v] for v in range(3)], np.uint16)))
        place = content.index(good, start + 128)
        path.write_bytes(content[:place] + bad + content[place + 2 :])
    batches = take(60, (tokens, features), global_batch=4, on_damaged="skip")
    assert sum(len(batch.damaged) for batch in batches) > 20
    for batch in batches:
        values = batch.features_BNC
        assert values is not None
        assert (values == batch.tokens_BL[:, 0, None, None]).all()


def test_labels_that_the_model_has_no_class_for(tmp_path: Path) -> None:
    """In a set without class names nothing else would notice before the embedding does, if it does."""
    settings_ = {"scales": [1, 2], "codebook_size": 64}
    manifest = Manifest(kind="tokens", shard_names=("a.tar",), made_by=MadeBy(name="t", settings=settings_))
    writer = ShardWriter(tmp_path, manifest)
    samples = ((f"k{n}", {"tokens.npy": npy_bytes(tokens_of(n)), "cls": b"%d" % n}) for n in range(6))
    writer.write_shard("a.tar", samples)
    writer.finish()
    assert len(list(evaluation_batches(tmp_path, None, batch_size=6, options=LoaderOptions(num_classes=6)))) == 1
    message = "sample 'k5' has label 5, but the model's classes are 0 to 4; set model.num_classes"
    with pytest.raises(UserError, match=message):
        take(1, (tmp_path, None), num_classes=5)
    with pytest.raises(UserError, match=message):  # a wrong recipe is no damaged sample
        take(1, (tmp_path, None), num_classes=5, on_damaged="skip")
    with pytest.raises(UserError, match=message):
        list(evaluation_batches(tmp_path, None, batch_size=6, options=LoaderOptions(num_classes=5)))


@given(st.lists(st.integers(), max_size=30), st.integers(0, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_ordered_map_is_map(items: list[int], threads: int, depth: int) -> None:
    assert list(ordered_map(str, items, threads, depth)) == [str(item) for item in items]


def test_pool_lends_memory_once_at_a_time() -> None:
    pool = BufferPool()
    first = pool.empty((3, 4), torch.int8)
    address, view = first.data_ptr(), first[1:]
    del first
    assert pool.empty((3, 4), torch.int8).data_ptr() != address  # `view` still needs it
    del view
    assert address in {tensor.data_ptr() for tensor in [pool.empty((3, 4), torch.int8) for _ in range(2)]}
