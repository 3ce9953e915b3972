"""The order of samples: a pure function with no sample lost or repeated, whatever reads it."""

from __future__ import annotations

import itertools
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.data.order import (
    OrderedStream,
    SampleOrder,
    WindowWatch,
    permutation,
    rank_batches,
    shuffle_quality,
    subset_of,
)
from mepa_ds.data.remote.fetched_ahead import fetched_ahead
from mepa_ds.errors import UserError

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum).map(tuple)
windows = st.one_of(st.none(), st.integers(1, 4))


@given(sizes=shard_sizes, seed=st.integers(0, 2**40), epoch=st.integers(0, 5), window=windows)
@settings(deadline=None)
def test_an_epoch_has_each_sample_once(sizes: tuple[int, ...], seed: int, epoch: int, window: int | None) -> None:
    order = SampleOrder(sizes, seed, window)
    samples = order.epoch(epoch)
    assert sorted(samples.tolist()) == list(range(sum(sizes)))
    assert (samples == SampleOrder(sizes, seed, window).epoch(epoch)).all()


def read_elastically(order: SampleOrder, legs: list[tuple[int, int, int]]) -> list[int]:
    """Positions in the order of global batches, over legs of (ranks, share of a rank, steps)."""
    stream, position, seen = OrderedStream(order), 0, []
    for world_size, share, steps in legs:
        global_batch = world_size * share
        ranks = [rank_batches(position, global_batch, rank, world_size) for rank in range(world_size)]
        for _ in range(steps):
            for rank in ranks:
                seen += stream.samples_at(next(rank).positions).tolist()
        position += steps * global_batch
    return seen


@given(
    sizes=shard_sizes,
    window=windows,
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=5),
)
@settings(deadline=None)
def test_any_interruptions_and_world_sizes_read_the_same_stream(
    sizes: tuple[int, ...], window: int | None, legs: list[tuple[int, int, int]]
) -> None:
    order = SampleOrder(sizes, 3, window)
    seen = read_elastically(order, legs)
    epochs = itertools.chain.from_iterable(order.epoch(epoch).tolist() for epoch in itertools.count())
    assert seen == list(itertools.islice(epochs, len(seen)))


@pytest.mark.parametrize(("last", "starts"), [(14, [2, 8]), (15, [2, 8, 14]), (20, [2, 8, 14])])
def test_a_bounded_stream_ends_with_the_batch_of_its_last_position(last: int, starts: list[int]) -> None:
    tasks = list(rank_batches(2, 6, 1, 2, last=last))
    assert [task.positions.tolist() for task in tasks] == [[start + 3, start + 4, start + 5] for start in starts]
    assert [task.next_position for task in tasks] == [start + 6 for start in starts]


def test_the_permutation_is_pinned() -> None:
    """The order must not change with NumPy's version: these numbers were written down once."""
    assert permutation(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(1, 0, 10).tolist() != permutation(0, 1, 10).tolist()


def test_permutations_are_uniform() -> None:
    """Each of 3! orders comes up a sixth of the time, over epochs and over seeds."""
    for draw in (lambda i: permutation(7, i, 3), lambda i: permutation(i, 7, 3)):
        counts = np.unique([tuple(draw(i)) for i in range(3000)], axis=0, return_counts=True)[1]
        assert len(counts) == 6
        assert (abs(counts - 500) < 5 * np.sqrt(500)).all()


@given(sizes=shard_sizes, window=st.integers(1, 4))
@settings(deadline=None)
def test_windows_keep_to_their_shards(sizes: tuple[int, ...], window: int) -> None:
    order = SampleOrder(sizes, 5, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    samples, start = order.epoch(2), 0
    for shards in order.windows(2):
        count = sum(sizes[shard] for shard in shards)
        assert set(shard_of[samples[start : start + count]].tolist()) <= set(shards)
        start += count
    assert sorted(itertools.chain.from_iterable(order.windows(2))) == list(range(len(sizes)))


def test_every_epoch_and_every_window_is_shuffled_anew() -> None:
    """The order of a shard's samples among themselves: it is another one in each epoch, and each window."""
    sizes = (40, 40, 40, 40)

    def own_orders(order: SampleOrder, epoch: int) -> list[tuple[int, ...]]:
        samples = order.epoch(epoch)
        return [tuple((samples[samples // 40 == shard] % 40).tolist()) for shard in range(4)]

    for window in (None, 1, 2, 4):
        orders = [SampleOrder(sizes, seed, window) for seed in (0, 1)]
        seen = [own for order in orders for epoch in (0, 1, 2) for own in own_orders(order, epoch)]
        assert len(set(seen)) == len(seen) == 24, window
        assert tuple(range(40)) not in seen
    windows = [tuple(map(tuple, SampleOrder((1,) * 8, 0, 2).windows(epoch))) for epoch in range(5)]
    assert len(set(windows)) == 5, "which shards share a window changes too"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_shards_of_a_window_are_needed_from_its_first_sample_on(window: int) -> None:
    """A plain count of samples, position by position over two epochs and a bit."""
    sizes = (3, 4, 0, 2, 5)
    order, total = SampleOrder(sizes, 3, window), sum(sizes)
    stream = [shards for epoch in range(4) for shards in order.windows(epoch)]
    firsts, position = [], 0
    for shards in stream:
        firsts.append(position)
        position += sum(sizes[shard] for shard in shards)
    watch = WindowWatch(order)
    for position in range(2 * total + 5):
        needed = watch.needed(position)
        begins = [number for number, first in enumerate(firsts) if first == position]
        if begins:  # of windows without samples that begin here, the last one's shards are read
            assert needed == stream[begins[-1]] + stream[begins[-1] + 1], position
        else:
            assert needed is None, position


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_shards_are_asked_for_before_their_first_sample(batch: int) -> None:
    """When a batch is handed on, the shard of its last sample has been asked for, and the one that follows."""
    sizes, asked = (3, 4, 2, 5), list[int]()

    class Cache:
        def prefetch(self, shards: list[int]) -> None:
            asked.extend(shards)

    order = SampleOrder(sizes, 3, window=1)
    windows = [shards[0] for epoch in range(4) for shards in order.windows(epoch)]
    shard_at = [shard for shard in windows for _ in range(sizes[shard])]
    window_at = [number for number, shard in enumerate(windows) for _ in range(sizes[shard])]
    assert shard_at[:14] == np.repeat(np.arange(4), sizes)[order.epoch(0)].tolist()
    for task in itertools.islice(fetched_ahead(rank_batches(0, batch, 0, 1), order, [Cache()]), 14):  # type: ignore[list-item]
        now = window_at[task.next_position - 1]
        assert asked[-2:] == windows[now : now + 2], task
        visited = len(set(window_at[: task.next_position]))
        assert len(asked) == 2 * visited, "neither sooner nor twice: the cache holds three windows"


def test_shuffle_quality_knows_good_from_bad() -> None:
    sizes = (100,) * 20
    shard_of = np.repeat(np.arange(20), sizes)
    full = shuffle_quality(SampleOrder(sizes, 0).epoch(0), shard_of, 50)
    assert full["displacement"] == pytest.approx(1, abs=0.05)
    assert full["shards_in_batch"] == pytest.approx(1, abs=0.02)
    windowed_order = SampleOrder(sizes, 0, window=4)
    windowed = [shuffle_quality(windowed_order.epoch(epoch), shard_of, 50) for epoch in range(30)]
    assert np.mean([quality["displacement"] for quality in windowed]) == pytest.approx(1, abs=0.1)
    assert 0.2 < windowed[0]["shards_in_batch"] < 0.3  # 4 of 18.7 expected
    unshuffled = shuffle_quality(np.arange(2000), shard_of, 50)
    assert unshuffled["displacement"] == 0
    assert unshuffled["shards_in_batch"] < 0.06


@given(
    sizes=shard_sizes,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(deadline=None)
def test_an_epoch_of_a_subset_has_each_of_its_samples_once(
    sizes: tuple[int, ...], seed: int, epoch: int, share: tuple[float, float]
) -> None:
    """In another order in each epoch, and a smaller subset lies within a larger one."""
    total = sum(sizes)
    small, large = sorted(max(1, round(part * total)) for part in share)
    orders = [SampleOrder(sizes, seed, subset=size) for size in (small, large)]
    chosen = [sorted(order.epoch(0).tolist()) for order in orders]
    assert [len(set(samples)) for samples in chosen] == [order.num_samples for order in orders] == [small, large]
    assert set(chosen[0]) <= set(chosen[1]) <= set(range(total))
    later = orders[0].epoch(epoch)
    assert sorted(later.tolist()) == chosen[0]
    # The order is that of a set which has only these samples.
    assert later.tolist() == [chosen[0][place] for place in SampleOrder((small,), seed).epoch(epoch).tolist()]
    assert (
        SampleOrder(sizes, seed, subset=total).epoch(epoch).tolist() == SampleOrder(sizes, seed).epoch(epoch).tolist()
    )


def test_subsets_are_uniform_and_pinned() -> None:
    counts = np.bincount(np.concatenate([subset_of(seed, 6, 2) for seed in range(3000)]), minlength=6)
    assert (abs(counts - 1000) < 5 * np.sqrt(1000 * 2 / 3)).all()
    assert subset_of(0, 10, 4).tolist() == [3, 5, 6, 8]
    assert sorted(permutation(0, 0, 10)[:4].tolist()) != subset_of(0, 10, 4).tolist()  # a stream of its own


def test_imagenet_takes_under_a_second() -> None:
    order = SampleOrder((1000,) * 1281, 0)
    stream = OrderedStream(order)
    start = time.process_time()
    stream.samples_at(np.arange(256))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampleOrder((), 0), "empty"),
        (lambda: SampleOrder((3,), -1), "seed"),
        (lambda: SampleOrder((3,), 0, 0), "window"),
        (lambda: SampleOrder((3, 4), 0, subset=8), "subset: expected 1 to 7, the samples of the set, got 8"),
        (lambda: SampleOrder((3, 4), 0, window=1, subset=2), "subset: a set that is fetched"),
        (lambda: next(rank_batches(0, 10, 0, 4)), "global batch 10 does not divide among 4 ranks"),
        (lambda: next(rank_batches(-1, 8, 0, 4)), "position"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("subset", [None, 4])
def test_a_stream_that_was_sent_to_another_process_goes_on_alike(subset: int | None) -> None:
    """Workers of the loader get theirs by pickle."""
    stream = OrderedStream(SampleOrder((3, 5, 2), seed=4, subset=subset))
    expected = [stream.samples_at(np.arange(start, start + 4)).tolist() for start in (0, 8, 21)]
    copy = pickle.loads(pickle.dumps(stream))
    assert [copy.samples_at(np.arange(start, start + 4)).tolist() for start in (0, 8, 21)] == expected
