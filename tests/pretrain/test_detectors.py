"""What watches over a run: gradients that are not finite, spikes, collapsed experts, hangs, crashes."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds import distributed
from mepa_ds.checkpoint.files import checkpoint_name, list_checkpoints
from mepa_ds.checkpoint.state import read_state
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.writer import npy_bytes
from mepa_ds.data.training import TrainingBatch
from mepa_ds.errors import UserError
from mepa_ds.objective.objective import Losses, ModelInputs, PretrainingObjective
from mepa_ds.pretrain import data
from mepa_ds.pretrain.bad_steps import BadSteps
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.pretrain.recording.detectors import CollapseDetector, SlowRankDetector, SpikeDetector
from mepa_ds.pretrain.trainer import PretrainRun
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE, Agreement
from mepa_ds.runtime.watchdog import HANG_EXIT_CODE
from mepa_ds.slurm.in_job.cause import cause_of
from tests.gates import Gates, install
from tests.hardware import needs_fp16
from tests.ranks import Ranks, arguments, finish
from tests.tiny_run import FEATURE_GRID, FEATURE_WIDTH, make_run, write_set

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose features are NaN for one image of 40: one step in 5, on one of two ranks."""
    folder = tmp_path_factory.mktemp("guards")
    make_run(folder, "train.steps=15", "log.evaluate_every=100", "log.checkpoint_every=2")
    poison(folder, "one", [7])
    poison(folder, "all", list(range(COUNT)))
    return folder


def poison(folder: Path, name: str, bad: list[int]) -> None:
    rng = np.random.default_rng(0)
    samples = []
    for number in range(COUNT):
        map_NP = rng.normal(size=(FEATURE_GRID**2, FEATURE_WIDTH)).astype(np.float16)
        samples.append({"features.npy": npy_bytes(map_NP * np.float16("nan") if number in bad else map_NP)})
    settings = {"codec": "fp16", "width": FEATURE_WIDTH, "grid_side": FEATURE_GRID}
    write_set(folder / f"{name}.features", "features", MadeBy(name="random", identity="0", settings=settings), samples)


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == kind]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_step_that_is_not_finite_is_skipped_and_its_images_named(folder: Path, precision: str) -> None:
    name = f"skipped_{precision}"
    settings = [f"data.features={folder}/one.features", f"parallel.precision={precision}", "parallel.ep_size=2"]
    finish(arguments(folder, name, *settings), 2, folder / f"{name}.log")
    output = folder / name
    train = events(output, "train")
    bad = [record for record in train if not record["applied"]]
    assert len(bad) == 3  # once an epoch of 5 steps
    assert train[-1]["skipped_steps"] == 3
    assert np.isfinite(train[-1]["loss"])
    state = read_state(list_checkpoints(output / "checkpoints")[-1])
    assert (state.adam_step, state.skipped_steps) == (12, 3)
    assert len(events(output, "skipped_step")) == 3
    keys: set[str] = set()
    for record in bad:
        dumps = [
            json.loads(path.read_text()) for path in output.glob(f"bad_batches/step_{record['step']:08d}_rank_*.json")
        ]
        assert len(dumps) == 2
        culprit = next(dump for dump in dumps if dump["losses"] == ["nan"])
        names = {key for batch in culprit["keys"] for key in batch}
        keys = names if not keys else keys & names
    assert "000007" in keys
    finish([*arguments(folder, name, *settings), "train.steps=16"], 2, folder / f"{name}.log")
    train = events(output, "train")
    assert train[-1]["skipped_steps"] == sum(not record["applied"] for record in train) >= 3, "it survives a new start"


def test_bad_steps_in_a_row_go_back_to_a_checkpoint_and_on_with_other_images(folder: Path) -> None:
    settings = [f"data.features={folder}/one.features", "guards.max_bad_steps=1", "log.checkpoint_every=1"]
    finish(arguments(folder, "rolled_back", *settings), 1, folder / "rolled_back.log")
    output = folder / "rolled_back"
    rollbacks = events(output, "rollback")
    assert len(rollbacks) >= 2
    for record in rollbacks:
        assert record["step"] == record["from_step"] - 1, "the newest checkpoint before it"
    train = events(output, "train")
    assert [record["step"] for record in train] == list(range(1, 16)), "every step stands there once"
    assert all(record["applied"] for record in train)
    state = read_state(list_checkpoints(output / "checkpoints")[-1])
    lost = sum(record["from_step"] - record["step"] for record in rollbacks)
    assert state.position == 8 * (15 + lost)
    assert train[-1]["skipped_steps"] == len(events(output, "skipped_step")) == len(rollbacks), "warnings stay"
    assert "back to step_0000" in (folder / "rolled_back.log").read_text()


def stop_in_the_first_bad_step() -> None:
    """Runs in each rank's process before the run: a signal comes while it is computed."""
    original, end, bad = InputMaker.training, Agreement.end, []

    def training(maker: InputMaker, *arguments: Any) -> ModelInputs:
        made = original(maker, *arguments)
        assert made.features_BNP is not None
        bad.append(bool(made.features_BNP.isnan().any()))
        return made

    InputMaker.training = training  # type: ignore[assignment, method-assign]
    Agreement.end = lambda agreement: end(agreement) or any(bad)  # type: ignore[assignment, method-assign]


def test_a_stop_in_the_step_of_a_rollback_keeps_the_place_in_the_data(folder: Path) -> None:
    settings = [f"data.features={folder}/one.features", "guards.max_bad_steps=1", "log.checkpoint_every=1"]
    log, output = folder / "stopped.log", folder / "stopped"
    with Ranks(arguments(folder, "stopped", *settings), 1, log, stop_in_the_first_bad_step) as ranks:
        assert ranks.wait() == [REQUEUE_EXIT_CODE], log.read_text()
    (rollback,) = events(output, "rollback")
    state = read_state(list_checkpoints(output / "checkpoints")[-1])
    assert (state.step, state.position) == (rollback["step"], 8 * rollback["from_step"])
    assert state.skipped_steps == 1
    finish(arguments(folder, "stopped", *settings), 1, log)
    (first, *_) = events(output, "skipped_step")
    assert first["step"] == rollback["from_step"], "its record is there"
    positions = [json.loads(path.read_text())["positions"] for path in (output / "bad_batches").iterdir()]
    assert len(positions) == events(output, "train")[-1]["skipped_steps"]


def damage_the_newest_checkpoint_before_a_rollback() -> None:
    """Runs in each rank's process before the run."""
    original, damaged = PretrainRun._roll_back, list[Any]()

    def roll_back(run: PretrainRun) -> None:
        run.settle()
        paths = list_checkpoints(run.config.output_dir / "checkpoints")
        if len(paths) > 1 and not damaged:
            damaged.append(paths[-1])
            (paths[-1] / "run.json").write_text("{}")
        original(run)

    PretrainRun._roll_back = roll_back  # type: ignore[assignment, method-assign]


def test_a_damaged_checkpoint_that_a_rollback_meets_is_told(folder: Path) -> None:
    settings = [f"data.features={folder}/one.features", "guards.max_bad_steps=1", "log.checkpoint_every=1"]
    log = folder / "meets.log"
    with Ranks(arguments(folder, "meets", *settings), 1, log, damage_the_newest_checkpoint_before_a_rollback) as ranks:
        assert ranks.wait() == [0], log.read_text()
    (record,) = events(folder / "meets", "damaged_checkpoint")
    assert "run.json has 2 bytes" in record["message"]
    assert f"warning: {record['message']}" in log.read_text()


def fill_the_disk_from_step_5_to_13() -> None:
    """Runs in each rank's process before the run: no file may grow, its log and TensorBoard's files neither."""
    original, calls = InputMaker.training, []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def training(maker: InputMaker, *arguments: Any) -> ModelInputs:
        calls.append(arguments)
        if len(calls) in (5, 14):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, unlimited[1]) if len(calls) == 5 else unlimited)
        return original(maker, *arguments)

    InputMaker.training = training  # type: ignore[assignment, method-assign]


def test_a_rollback_on_a_full_disk_loses_nothing(folder: Path) -> None:
    """Every image is seen once in 5 steps, so one of 9 steps at least is taken back; TensorBoard is rewound too."""
    settings = [f"data.features={folder}/one.features", "guards.max_bad_steps=1", "log.checkpoint_every=1"]
    log, output = folder / "full.log", folder / "full"
    with Ranks(
        arguments(folder, "full", *settings, "train.steps=30", "log.tensorboard=true"),
        1,
        log,
        fill_the_disk_from_step_5_to_13,
    ) as ranks:
        assert ranks.wait() == [0], log.read_text()
    assert len(events(output, "rollback")) >= 4
    assert events(output, "write_failed")
    train = events(output, "train")
    assert [record["step"] for record in train] == list(range(1, 31)), "every step stands there once"
    assert train[-1]["skipped_steps"] == len(events(output, "skipped_step")) == len(events(output, "rollback"))
    assert "step 30/30" in log.read_text()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(output / "tensorboard"))
    shown.Reload()
    steps = [scalar.step for scalar in shown.Scalars("train/loss")]
    assert steps == sorted(set(steps)), "no step twice"
    assert steps[-1] == 30


@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        ("all", [], "(the gradient: not finite), and there is no checkpoint yet"),
        ("one", ["optim.base_lr=0.02"], "(the gradient: not finite), also after 3 rollbacks"),
    ],
)
def test_a_run_that_cannot_be_mended_ends(folder: Path, features: str, settings: list[str], message: str) -> None:
    name = f"hopeless_{features}"
    if features == "one":  # a good checkpoint, but all data after it are bad
        finish(arguments(folder, name, "train.steps=4"), 2, folder / f"{name}.log")
        state = folder / name / "checkpoints" / checkpoint_name(4) / "run.json"
        make_it_the_data_of(state, folder / "all.features")
    common = [f"data.features={folder}/all.features", "guards.max_bad_steps=3", *settings]
    with Ranks(arguments(folder, name, *common), 2, folder / f"{name}.log") as ranks:
        assert ranks.wait() == [2, 2], ranks.log.read_text()
    assert ranks.log.read_text().count(message) == 1
    assert "Look at these, or lower optim.base_lr" in ranks.log.read_text()
    assert json.loads((folder / name / "status.json").read_text())["state"] == "diverged"
    rollbacks = events(folder / name, "rollback")
    assert [record["step"] for record in rollbacks] == ([4, 4, 4] if features == "one" else [])


def test_a_run_whose_loss_is_out_of_hand_ends_as_diverged(folder: Path) -> None:
    """On two ranks, at the first record above the limit, with one message and the status of a mistake."""
    settings = ["guards.diverged_above=2.0", "log.every=2", "train.steps=15"]  # ln(16) is 2.77 at the start
    with Ranks(arguments(folder, "diverged", *settings), 2, folder / "diverged.log") as ranks:
        assert ranks.wait() == [2, 2], ranks.log.read_text()
    assert ranks.log.read_text().count("the run has diverged: the cross-entropy is 2.") == 1
    status = json.loads((folder / "diverged/status.json").read_text())
    assert (status["state"], status["step"]) == ("diverged", 2)
    assert len(events(folder / "diverged", "train")) == 1


def test_a_checkpoint_is_gone_back_to_three_times(tmp_path: Path) -> None:
    """Each checkpoint by itself; steps in a row are counted from 0 after each, all of them for the run."""
    bad = BadSteps(2, tmp_path)
    for rollback in range(1, 4):
        for to_step in (10, 20):
            bad.note(21, [], [], "it")
            assert not bad.rollback_due
            bad.note_good()  # ends the row
            due = []
            for step in (23, 24):
                bad.note(step, [], [], "it")
                due.append(bad.rollback_due)
            assert due == [False, True]
            bad.rolled_back(50, to_step)
        assert bad.total == 6 * rollback
    with pytest.raises(UserError, match="also after 3 rollbacks"):
        bad.rolled_back(50, 20)
    bad.rolled_back(50, 30)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        bad.rolled_back(50, None)


def make_it_the_data_of(run_json: Path, features: Path) -> None:
    """Edits a checkpoint's record of its data (and the manifest), as if it had been trained on these features."""
    from mepa_ds.checkpoint.files import digest
    from mepa_ds.pretrain.data import _set_identity

    state = json.loads(run_json.read_text())
    state["data"]["data.features"] = _set_identity(ShardSet(features))
    run_json.write_text(json.dumps(state))
    manifest = json.loads(run_json.with_name("manifest.json").read_text())
    manifest["files"]["run.json"] = digest(run_json)
    run_json.with_name("manifest.json").write_text(json.dumps(manifest))


@needs_fp16
def test_fp16_overflows_are_not_bad_steps_while_the_scale_can_fall(folder: Path) -> None:
    """The first loss scale, 2^16, times a cross-entropy weighted 10^4 fold overflows; with max_bad_steps=1 it may."""
    settings = ["parallel.precision=fp16", "guards.max_bad_steps=1", "objective.ce_weight=10000"]
    finish(arguments(folder, "fp16", *settings), 1, folder / "fp16.log")
    train = events(folder / "fp16", "train")
    assert not train[0]["applied"]
    assert train[-1]["applied"]
    assert train[-1]["skipped_steps"] == 0
    assert not (folder / "fp16/bad_batches").exists()


def test_a_spike_is_far_above_the_recent_losses() -> None:
    rng = np.random.default_rng(0)
    noise = (5 - 0.01 * np.arange(60) + 0.05 * rng.normal(size=60)).tolist()
    detector = SpikeDetector(noise[:5])
    assert not any(detector(loss) for loss in noise[5:])
    assert detector(6.0)
    assert not detector(4.4), "a spike does not move what is usual"
    assert detector(float("nan"))
    wide = [4.7, 5.3] * 10  # 6 x 1.4826 x 0.3 above 5 is 7.67
    assert [SpikeDetector(wide)(loss) for loss in (7.6, 7.7)] == [False, True]
    assert not SpikeDetector([5.0] * 9)(50.0), "too few to judge"


def test_a_lasting_change_of_level_is_told_ten_times() -> None:
    """A loss that stays higher (another weight of a term, say) is what is usual from then on."""
    rng = np.random.default_rng(0)
    detector = SpikeDetector((5 + 0.05 * rng.normal(size=50)).tolist())
    higher = (7 + 0.05 * rng.normal(size=40)).tolist()
    assert [detector(loss) for loss in higher] == [True] * 10 + [False] * 30
    assert [detector(loss) for loss in ([9.0] * 9 + [7.0]) * 3] == ([True] * 9 + [False]) * 3, "not in a row"


@pytest.mark.parametrize(("num_experts", "limit"), [(8, 0.01), (128, 0.08 / 128)])
def test_an_expert_is_collapsed_after_500_steps_with_next_to_no_load(num_experts: int, limit: float) -> None:
    def load(dying: float) -> dict[str, list[float]]:
        return {"load": [dying] + [(1 - dying) / (num_experts - 1)] * (num_experts - 1)}

    detector = CollapseDetector()
    even = {"3": load(1 / num_experts), "4": load(1 / num_experts)}
    dying = {"3": load(0.99 * limit), "4": load(1.01 * limit)}
    assert detector(0, even) == []
    assert [detector(step, dying) for step in range(50, 601, 50)] == [[]] * 10 + [["3.0"]] * 2
    assert detector(650, even) == []
    assert detector(2000, dying) == [], "a gap between records is no collapse"
    assert detector(2499, dying) == []
    assert detector(2500, dying) == ["3.0"]


def test_a_rank_is_slow_after_ten_records_at_more_than_1_3_times_the_fastest() -> None:
    slow, even, other = ({"min": 1.0, "max": m, "max_rank": r} for m, r in ((1.4, 3), (1.2, 3), (1.4, 5)))
    detector = SlowRankDetector()
    assert [detector(slow) for _ in range(10)] == [None] * 9 + [3]
    assert [detector(slow) for _ in range(10)] == [None] * 9 + [3], "not at every record"
    assert [detector(record) for record in [slow] * 9 + [even] + [slow] * 9 + [other] * 9] == [None] * 28


def sleep_in_rank_1() -> None:
    """Runs in each rank's process before the run."""
    if distributed.read_launch().rank == 1:
        original = InputMaker.training

        def training(maker: InputMaker, *arguments: Any) -> ModelInputs:
            time.sleep(0.5)  # more than what other work on the machine takes from rank 0
            return original(maker, *arguments)

        InputMaker.training = training  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("ep_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_slow_rank_is_named(folder: Path, ep_size: int) -> None:
    """Rank 0 waits for it in the forward pass, in all-to-all or in the sum of the counts, and is not blamed for it."""
    name = f"slow{ep_size}"
    with Ranks(
        arguments(folder, name, f"parallel.ep_size={ep_size}", "train.steps=25"),  # ten in a row, with a hiccup too
        2,
        folder / f"{name}.log",
        sleep_in_rank_1,
    ) as ranks:
        assert ranks.wait() == [0, 0], ranks.log.read_text()
    warnings = events(folder / name, "slow_rank")
    assert {warning["rank"] for warning in warnings} == {1}
    assert len(warnings) <= 2, "not at every record"
    assert "rank 1 takes more than 1.3 times as long" in ranks.log.read_text()
    for record in events(folder / name, "train"):
        assert (record["all_to_all_seconds"] > 0) == (ep_size == 2)
        assert record["all_to_all_seconds"] < record["forward_seconds"] + record["backward_seconds"]
        assert record["ranks"]["own_seconds"]["max"] > 0.3


def load_slowly_in_rank_1() -> None:
    """Runs in each rank's process before the run."""
    if distributed.read_launch().rank == 1:
        original = data.training_batches

        def slow(*arguments: Any, **settings: Any) -> Iterator[TrainingBatch]:
            for batch in original(*arguments, **settings):
                time.sleep(0.3)
                yield batch

        data.training_batches = slow


def test_a_rank_that_loads_slowly_is_named_and_waited_for_as_data(folder: Path) -> None:
    log, output = folder / "loads.log", folder / "loads"
    with Ranks(arguments(folder, "loads", "train.steps=11"), 2, log, load_slowly_in_rank_1) as ranks:
        assert ranks.wait() == [0, 0], log.read_text()
    (warning,) = events(output, "slow_rank")
    assert warning["rank"] == 1
    train = events(output, "train")
    own, waited = (np.median([record[key] for record in train]) for key in ("loader_seconds", "data_seconds"))
    assert own < 0.15 < waited, "rank 0 waits, but not for its own loader"
    for loader in (record["ranks"]["loader_seconds"] for record in train):
        assert loader["max"] >= 0.3
        assert loader["max_rank"] == 1


def double_the_loss_of_step_11() -> None:
    """Runs in each rank's process before the run."""
    original, calls = PretrainingObjective.forward, []

    def forward(objective: PretrainingObjective, inputs: ModelInputs) -> Losses:
        losses = original(objective, inputs)
        calls.append(losses)
        if len(calls) == 11:
            losses.total = losses.total * 2
        return losses

    PretrainingObjective.forward = forward  # type: ignore[assignment, method-assign]


def test_a_spike_between_logged_steps_is_seen(folder: Path) -> None:
    settings = ["log.every=5", "optim.base_lr=0.001"]
    with Ranks(arguments(folder, "spike", *settings), 2, folder / "spike.log", double_the_loss_of_step_11) as ranks:
        assert ranks.wait() == [0, 0], ranks.log.read_text()
    (spike,) = events(folder / "spike", "loss_spike")
    assert spike["step"] == 11


@needs_fp16
def test_a_nan_batch_is_bad_under_fp16_though_the_scale_could_fall(folder: Path) -> None:
    """NaN features make the loss itself NaN on one rank of two, whatever the loss scale."""
    settings = [f"data.features={folder}/one.features", "parallel.precision=fp16"]
    finish(arguments(folder, "fp16_nan", *settings), 2, folder / "fp16_nan.log")
    assert len(events(folder / "fp16_nan", "skipped_step")) == 3
    assert events(folder / "fp16_nan", "train")[-1]["skipped_steps"] == 3


def start_at_the_smallest_scale() -> None:
    """Runs in each rank's process before the run."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    original = DynamicLossScaler.__init__

    def init(scaler: DynamicLossScaler, *arguments: Any, **values: Any) -> None:
        original(scaler, *arguments, **values)
        scaler.cur_scale = scaler.min_scale

    DynamicLossScaler.__init__ = init


@needs_fp16
def test_an_overflow_at_the_smallest_scale_is_a_bad_step(folder: Path) -> None:
    settings = ["parallel.precision=fp16", "objective.ce_weight=1e9", "guards.max_bad_steps=4"]
    log = folder / "smallest.log"
    with Ranks(arguments(folder, "smallest", *settings), 2, log, start_at_the_smallest_scale) as ranks:
        assert ranks.wait() == [2, 2], ranks.log.read_text()
    message = "error: guards.max_bad_steps: 4 steps in a row were skipped (the gradient: not finite)"
    assert log.read_text().count(message) == 1


def test_a_hang_dumps_all_stacks_and_exits(folder: Path) -> None:
    """Rank 1 is stopped at a gate; rank 0 waits for it in vain. It has more patience than a start takes."""
    settings = ["train.steps=100000", "guards.hang_timeout=5", "log.every=10"]
    gates = Gates(folder / "hung.gates", "step_11")
    with Ranks(arguments(folder, "hung", *settings), 2, folder / "hung.log", partial(install, gates.folder)) as ranks:
        gates.wait("step_11", 2, ranks.check)
        ranks.signal(signal.SIGSTOP, 1)
        gates.open("step_11")
        ranks.processes[0].join(100)
        assert ranks.processes[0].exitcode == HANG_EXIT_CODE
    log = ranks.log.read_text()
    assert "rank 0: no step for 5 seconds (guards.hang_timeout)" in log
    assert "objective.py" in log
    assert "objective.py" in (folder / "hung/hang_rank_00000.txt").read_text()


def crash_in_step_5_of_rank_1() -> None:
    """Runs in each rank's process before the run."""
    if distributed.read_launch().rank != 1:
        return
    original, calls = InputMaker.training, []

    def training(maker: InputMaker, *arguments: Any) -> ModelInputs:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyError("injected")
        return original(maker, *arguments)

    InputMaker.training = training  # type: ignore[assignment, method-assign]


def test_a_crash_is_told_once_with_its_cause_first(folder: Path) -> None:
    with Ranks(arguments(folder, "crash"), 2, folder / "crash.log", prepare=crash_in_step_5_of_rank_1) as ranks:
        statuses = ranks.wait()
    log = ranks.log.read_text()
    assert statuses == [1, 1], log
    assert log.count("Traceback (most recent call last)") == 1, log
    assert "rank 1 failed:" in log
    assert "KeyError: 'injected'" in log
    assert "rank 0: ended because rank 1 failed: " in log
    status = json.loads((folder / "crash/status.json").read_text())
    assert (status["state"], status["rank"]) == ("failed", 1)


def test_a_killed_rank_is_named_and_one_of_its_peers_speaks(folder: Path) -> None:
    """kill -9 leaves no report: of the two others one prints its traceback, under a line that says who is missing.

    The last one may learn of it only when the first one has ended.
    """
    settings = ["train.steps=100000", "train.global_batch=9", "log.checkpoint_every=100000"]
    gates, log = Gates(folder / "killed.gates", "step_4"), folder / "killed.log"
    with Ranks(arguments(folder, "killed", *settings), 3, log, partial(install, gates.folder)) as ranks:
        gates.wait("step_4", 3, ranks.check)
        ranks.signal(signal.SIGKILL, 1)
        ranks.processes[1].join()
        gates.open("step_4")
        assert ranks.wait() == [1, -signal.SIGKILL, 1]
    said = ranks.log.read_text()
    assert said.count("Traceback (most recent call last)") == 1, said
    cause = cause_of(said)
    assert cause is not None
    assert cause.startswith("no answer from rank 1: killed from outside"), said
    assert "lost a peer: RuntimeError" in said
    reports = [json.loads((folder / f"killed/errors/rank_{rank:05d}.json").read_text()) for rank in (0, 2)]
    assert all("Traceback" in report["traceback"] for report in reports)
    status = json.loads((folder / "killed/status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", cause.split("; rank")[0])
