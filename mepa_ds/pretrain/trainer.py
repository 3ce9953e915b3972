"""One pretraining run: it resumes, takes steps, and evaluates, draws and saves between two steps."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mepa_ds import distributed
from mepa_ds.checkpoint.background_writer import Written
from mepa_ds.checkpoint.files import list_checkpoints
from mepa_ds.checkpoint.state import RunState
from mepa_ds.config.base import dump_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.lockstep import lockstep
from mepa_ds.data.training import TrainingBatch, TrainingSets
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.files import write_text
from mepa_ds.objective.flops import peak_flops_per_second, step_flops
from mepa_ds.objective.objective import nonfinite_routers
from mepa_ds.objective.reports import any_nonfinite
from mepa_ds.pretrain.bad_steps import BadSteps, check_divergence
from mepa_ds.pretrain.branching import open_branch
from mepa_ds.pretrain.checkpointing import BEST, BestWeights, Kept, Loaded, RunCheckpoints
from mepa_ds.pretrain.data import Loader, data_identity, heldout_identity, stream_of
from mepa_ds.pretrain.evaluation.evaluations import Evaluations, StopError
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.pretrain.online import OnlineSets
from mepa_ds.pretrain.recording.metrics import StepMetrics
from mepa_ds.pretrain.recording.report import StepClock, StepReport
from mepa_ds.pretrain.resuming import changes_since, check_checkpoint, without_missing_best
from mepa_ds.pretrain.start import record_start
from mepa_ds.runtime.recorder import Recorder, RunRecorder, peak_memory_bytes
from mepa_ds.runtime.schedule import check_phases, guidance_strength, learning_rate, scales_in_step
from mepa_ds.runtime.stopping import Agreement, StopRequests, stopped
from mepa_ds.runtime.trackers.opening import open_trackers
from mepa_ds.runtime.watchdog import Watchdog
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer


class PretrainRun:
    """One run: its engine, its place in the sample stream (`state`), and the objects that watch, save and record it.

    All methods are collective. Only this class changes `state`.
    """

    def __init__(
        self, config: PretrainConfig, sets: TrainingSets | OnlineSets, device: torch.device, requests: StopRequests
    ):
        self.config, self.sets = config, sets
        self.num_steps = config.train.num_steps(sets.num_samples)
        check_phases(config.optim, self.num_steps)
        self.memory_before = peak_memory_bytes()
        data = data_identity(config, sets)
        resumes = distributed.of_main(bool(list_checkpoints(config.output_dir / "checkpoints")))
        self.branch = None if resumes or config.branch_from is None else open_branch(config, data, sets.num_samples)
        self.engine = PretrainEngine(config, sets.feature_width, device, resumes, sets.class_names)
        quantizer = MultiScaleQuantizer.load(config.tokenizer, config.model.scales)
        self.inputs = InputMaker(config.model, quantizer, config.seed, device)
        self.watchdog = Watchdog(config.guards.hang_timeout, config.output_dir)
        kept = Kept(config.log.keep_checkpoints, config.log.keep_every, config.log.keep_steps)
        self.checkpoints = RunCheckpoints(self.engine, config.output_dir, kept, self.watchdog.beat)
        recipe = json.loads(config.model_dump_json())
        self.state = RunState(data=data, heldout=heldout_identity(config.data.heldout_tokens), recipe=recipe)
        self.evaluations = Evaluations(
            config, self.engine, self.inputs, sets.class_names, self._beat_or_stop, self.watchdog.beat
        )
        self.requests, self.agreement = requests, Agreement(requests)
        self.bad_steps = BadSteps(config.guards.max_bad_steps, config.output_dir / "bad_batches")
        self.best: BestWeights | None = None
        """The best weights by an evaluation, as long as they are not yet in `<output_dir>/best`."""

    def resume(self) -> None:
        """Continues from the newest whole checkpoint in output_dir, or else from `branch_from`; opens the records."""
        config, ours = self.config, self.state
        loaded = self._load_newest()
        heldout_changed = loaded is not None and loaded.state.heldout not in ("", ours.heldout)
        if loaded is not None:
            self._take_up(loaded.state)
        if heldout_changed:
            self.state.best_heldout_ce = float("inf")
        state = self.state
        self.bad_steps.total = state.skipped_steps
        self.recorder = Recorder()
        if distributed.is_main():
            write_text(config.output_dir / "resolved.yaml", dump_yaml(config))
            trackers = open_trackers(config, state.step)
            self.recorder = RunRecorder(
                config.output_dir, state.step, self.num_steps, state.metrics_records, trackers, config.log.tracked
            )
        flops_of_step = partial(step_flops, config, self.sets.feature_width)
        peak = peak_flops_per_second(config.parallel.precision)
        batch = config.train.global_batch
        guided = config.objective.alignment.scales if config.objective.alignment else ()
        self.metrics = StepMetrics(
            self.recorder, state.window, config.model.schedule, batch, flops_of_step, peak, guided
        )
        facts: dict[str, Any] = {"num_steps": self.num_steps, "num_samples": self.sets.num_samples}
        facts["memory_before_bytes"] = self.memory_before
        facts |= {} if self.branch is None else {"branch_from": str(self.branch.path)}
        changes = {} if loaded is None else changes_since(loaded.state.recipe, ours.recipe)
        record_start(self.recorder, state.step, config, self.engine, self.sets.feature_width, facts, changes)
        if loaded is not None:
            self._warn_of_damage(loaded)
            if heldout_changed:
                line = "data.heldout_tokens has changed, so the best score on the old held-out set no longer counts"
                self.recorder.warn("heldout_changed", state.step, line)
            verb = "resumed" if self.branch is None else "branched"
            self.recorder.say(f"{verb} from {loaded.path} at step {state.step} of {self.num_steps}")
        if self.branch is not None:  # a rollback to this place keeps what was recorded until here
            self.branch.state.metrics_records = self.recorder.num_records

    def train(self) -> bool:
        """Trains to the end of the recipe, or until the run is stopped. Returns whether the run is finished."""
        # A stopped run saves at once and leaves what is due to the next start.
        stop = self._evaluate_if_due() or self._score_if_due()
        self._export_best()
        self._open_stream()
        while self.state.step < self.num_steps and not stop:
            stop = self.train_step()
            if self.bad_steps.rollback_due:
                self._roll_back()
                if stop:  # otherwise the next start would read the same images again
                    self._save()
                continue
            stop = stop or self._evaluate_if_due() or self._score_if_due() or self._draw_if_due()
            if stop or self._save_is_due():
                self._save()
            else:
                self._export_best()
            self._note_written(self.checkpoints.ended())
        finished = self.state.step >= self.num_steps and not stop
        if finished:
            self._finish()
        else:
            self._stop()
        return finished

    def train_step(self) -> bool:
        """Takes one optimizer step, from its images to its record. Returns whether a rank was asked to stop."""
        config, state, engine = self.config, self.state, self.engine
        self.agreement.begin()  # asks all ranks whether to stop; the answer arrives while the step is computed
        step = state.step + 1
        logged = step % config.log.every == 0 or step == self.num_steps
        engine.begin_step(timed=logged)
        clock, loader_seconds_before = StepClock(logged, engine.waits), self.loader.seconds

        batches = list(itertools.islice(self.batches, config.train.accumulation))  # this rank's micro-batches
        clock.lap("data")
        lr = learning_rate(config.optim, config.train.global_batch, state.step, self.num_steps)
        scales = scales_in_step(config.train.progressive, len(config.model.scales), state.step, self.num_steps)
        alignment = config.objective.alignment
        guidance = guidance_strength(alignment.until if alignment else None, state.step, self.num_steps)
        losses = []
        for batch in batches:
            inputs = self.inputs.training(batch, scales)  # codebook inputs, dropped labels, stochastic depth
            inputs = replace(inputs, guidance=guidance)
            clock.lap("inputs")
            loss = engine.forward(inputs)
            clock.lap("forward")
            loss = engine.backward(loss)  # the losses without their graph
            clock.lap("backward")
            losses.append(loss)
        update = engine.update(lr)  # clips gradients; updates weights, their average and the balance bias
        clock.lap("optimizer")

        state.step, state.position = step, batches[-1].next_position
        stop = self.agreement.end()
        self.watchdog.beat()
        clock.stop()
        report = StepReport(step, lr, scales, losses, update.grad_norm, update.applied, clock)
        self.metrics.note(report)
        self._note_if_bad(report, batches)
        if not self.bad_steps.rollback_due:
            self.recorder.advance(step)
            if logged:
                self._record(report, self.loader.seconds - loader_seconds_before)
        return stop

    def _record(self, report: StepReport, loader_seconds: float) -> None:
        state, damaged = self.state, self.loader.take_damaged()
        state.replaced_samples += len(damaged)
        place = {
            "epoch": state.position / self.sets.num_samples,
            "images": state.position,
            "skipped_steps": self.bad_steps.total,
            "replaced_samples": state.replaced_samples,
        }
        ce = self.metrics.write(report, place, damaged, loader_seconds)
        check_divergence(ce, self.config.guards.diverged_above, report.step)

    def settle(self) -> None:
        """Waits for everything that is being written to disk, and records the results."""
        self._note_written(self.checkpoints.settle())

    def _open_stream(self) -> None:
        self.loader = Loader(stream_of(self.config, self.sets), self.state.position)
        self.batches = lockstep(self.loader)

    # Steps whose gradient is not finite.

    def _note_if_bad(self, report: StepReport, batches: list[TrainingBatch]) -> None:
        """Counts a skipped step. An fp16 overflow does not count while the loss scale can still come down."""
        if report.applied:
            self.bad_steps.note_good()
            return
        if self.engine.can_overflow and not any_nonfinite(report.losses):
            return
        routers = nonfinite_routers(report.losses)
        cause = f"router logits of blocks {routers}" if routers else "the gradient"
        line = f"{cause}: not finite, the step was skipped; its images: {self.bad_steps.directory}"
        self.recorder.warn("skipped_step", report.step, line)
        losses = [losses.total.detach() for losses in report.losses]
        self.bad_steps.note(report.step, batches, losses, cause)

    def _roll_back(self) -> None:
        """Goes back to the newest checkpoint's weights, and continues after the data of the bad steps."""
        in_a_row, position, step = self.bad_steps.in_a_row, self.state.position, self.state.step
        self.settle()
        best_heldout_ce = self.state.best_heldout_ce
        loaded = self._load_newest()
        self.bad_steps.rolled_back(step, None if loaded is None else loaded.state.step)
        assert loaded is not None
        self._take_up(loaded.state)
        self.state.position, self.state.best_heldout_ce = position, best_heldout_ce
        self.recorder.rewind(self.state.step, self.state.metrics_records)
        self._warn_of_damage(loaded)
        line = (
            f"gradients of {in_a_row} steps up to step {step} were not finite: back to {loaded.path.name}, "
            f"images up to position {position} are skipped"
        )
        self.recorder.warn("rollback", self.state.step, line, from_step=step, position=position)
        self.metrics.restart(self.state.window)
        self._open_stream()

    # Work that is due between two steps. `_..._if_due` return whether a rank was asked to stop.

    def _beat_or_stop(self) -> None:
        """Reports progress during an evaluation; raises StopError on all ranks when one rank is asked to stop."""
        self.watchdog.beat()
        self.agreement.begin()
        if self.agreement.end():
            raise StopError

    def _evaluate_if_due(self) -> bool:
        """Evaluates the model if it is due. An interrupted evaluation is left to the next start."""
        step, log = self.state.step, self.config.log
        due = step > 0 and (step % log.evaluate_every == 0 or step == self.num_steps)
        if not due or self.state.evaluated_step == step or self.config.data.heldout_tokens is None:
            return False
        try:
            scores = self.evaluations.heldout_scores()
        except StopError:
            return True
        self._settle_best()
        is_best = scores["ce"] < self.state.best_heldout_ce
        if is_best:
            self.best = BestWeights(step, scores["ce"])
        self.evaluations.record(self.recorder, step, scores, is_best)
        self.state.evaluated_step = step
        return False

    def _score_if_due(self) -> bool:
        """Scores generated images if it is due. An interrupted scoring is left to the next start."""
        step, every = self.state.step, self.config.log.score_every
        due = every is not None and step > 0 and (step % every == 0 or step == self.num_steps)
        if not due or self.state.scored_step == step:
            return False
        try:
            self.evaluations.score(self.recorder, step)
        except StopError:
            return True
        self.state.scored_step = step
        return False

    def _draw_if_due(self) -> bool:
        """Draws a picture if it is due. An interrupted picture is not drawn later."""
        every = self.config.log.sample_every
        if every is None or self.state.step % every:
            return False
        try:
            self.evaluations.draw(self.recorder, self.state.step)
        except StopError:
            return True
        return False

    # Saving and loading.

    def _save_is_due(self) -> bool:
        """Returns whether to save. No checkpoint is saved amid bad steps, because going back to it would not help."""
        step, log = self.state.step, self.config.log
        due = step % log.checkpoint_every == 0 or step in log.keep_steps
        return step == self.num_steps or (due and not self.bad_steps.in_a_row)

    def _save(self) -> None:
        """Saves a checkpoint of this step, and exports its weights to <output_dir>/best if they are the best so far."""
        best = self.best if self.best is not None and self.best.step == self.state.step else None
        if best is None:
            self._settle_best()
        self.state.skipped_steps, self.state.window = self.bad_steps.total, self.metrics.cut()
        self.state.metrics_records = self.recorder.num_records
        self.checkpoints.save(self.state, best)

    def _export_best(self) -> None:
        """Exports the weights to <output_dir>/best, if this step's evaluation found them to be the best."""
        if self.best is not None and self.best.step == self.state.step:
            self.checkpoints.export(BEST, self.state.step)

    def _settle_best(self) -> None:
        """Waits until all ranks know whether an earlier export of the best weights has succeeded."""
        if self.best is not None:
            self.settle()

    def _note_written(self, ended: list[Written]) -> None:
        """Records which checkpoints and exports were written. A failure does not end the run: another will follow."""
        for written in ended:
            if written.what == BEST and self.best is not None:
                if written.error is None:
                    self.state.best_heldout_ce = self.best.heldout_ce
                self.best = None
            seconds = {"stalled_seconds": written.stalled_seconds, "write_seconds": written.write_seconds}
            if written.error is None:
                self.recorder.record("written", self.state.step, {"what": written.what, **seconds})
            else:
                line = f"{written.what} could not be written ({written.error}); what was there before is kept"
                self.recorder.warn("write_failed", self.state.step, line, what=written.what, **seconds)

    def _load_newest(self) -> Loaded | None:
        check = partial(check_checkpoint, config=self.config, data=self.state.data)
        loaded = self.checkpoints.load_newest(check)
        if loaded is None and self.branch is not None:
            loaded = self.checkpoints.load_foreign(self.branch.path, self.branch.state)
        if loaded is not None:
            has_heldout = self.config.data.heldout_tokens is not None
            loaded = replace(loaded, state=without_missing_best(self.checkpoints, loaded.state, has_heldout))
        self.checkpoints.forget_last_weights_after(0 if loaded is None else loaded.state.step)
        return loaded

    def _take_up(self, state: RunState) -> None:
        """Takes over a checkpoint's state, but keeps this start's recipe (its length and logging may have changed)."""
        self.state = replace(state, recipe=self.state.recipe, heldout=self.state.heldout)

    def _warn_of_damage(self, loaded: Loaded) -> None:
        for line in loaded.damaged:
            self.recorder.warn("damaged_checkpoint", self.state.step, line)

    # The end of this start.

    def _stop(self) -> None:
        """Waits until everything is on disk, and records why the run stopped and that it is to be started again."""
        self.settle()
        self.watchdog.stop()
        reason, step = self.requests.reason, self.state.step
        line = stopped(step, self.num_steps, reason, self.checkpoints.newest_step)
        self.recorder.close("requeue", step, line, reason=reason or "another rank")

    def _finish(self) -> None:
        """Exports the last weights. A finished run that is started again only says that it is done."""
        ended = self.checkpoints.export_last(self.state.step)
        self._note_written(ended)
        self.checkpoints.check_last(ended)
        self.watchdog.stop()
        last = self.config.output_dir / "last"
        self.recorder.close("finished", self.state.step, f"done: {self.state.step} steps, weights in {last}")
