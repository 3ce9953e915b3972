"""The pretraining run, read from top to bottom: check, build, resume, train, evaluate, save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mepa_ds import distributed
from mepa_ds.checkpoint.files import RunState, list_checkpoints
from mepa_ds.config.base import dump_yaml
from mepa_ds.config.changes import recipe_changes
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.lockstep import lockstep
from mepa_ds.data.training import TrainingBatch, TrainingSets
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.checkpoint import Loaded, agreed
from mepa_ds.engine.engine import PretrainEngine, StepReport
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.generation.sample_grids import SampleGrids, UnwrittenError
from mepa_ds.objective.objective import nonfinite_routers
from mepa_ds.objective.reports import any_nonfinite
from mepa_ds.precision import refusal
from mepa_ds.pretrain.checkpointing import RunSaver
from mepa_ds.pretrain.data import Loader, data_identity, heldout_identity, open_checked
from mepa_ds.pretrain.detectors import BadSteps, Watchdog
from mepa_ds.pretrain.evaluation import heldout_scores
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.pretrain.online import OnlineSets
from mepa_ds.pretrain.start import prepared_output, record_start
from mepa_ds.pretrain.step_metrics import StepRecords
from mepa_ds.runtime.failures import reporting
from mepa_ds.runtime.recorder import Recorder, peak_memory_bytes
from mepa_ds.runtime.schedule import learning_rate, scales_in_step
from mepa_ds.runtime.stopping import Agreement, StopRequests, deadline, stopped, undisturbed
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer import Tokenizer


def pretrain(config: PretrainConfig, requests: StopRequests) -> bool:
    """Runs, or resumes, the recipe on all ranks that the launcher started. Collective.

    Returns whether the run is finished; if not, a signal or a time limit has stopped it, and it has been saved.

    Raises UserError, on every rank, before anything is trained, when the recipe does not fit data or ranks.
    """
    launch = distributed.read_launch()
    requests.stop_at(deadline(config.guards.time_limit, config.guards.stop_before_end, os.environ))

    def run_to_the_end() -> bool:
        config.check_world(launch.world_size)
        deepspeed_config.read_knobs(config.parallel.deepspeed)
        with undisturbed():
            device = distributed.start(launch)
        distributed.agree(refusal(config.parallel.precision, device))
        sets = open_checked(config)
        with prepared_output(config):
            run = PretrainRun(config, sets, device, requests)
            run.resume()
            try:
                return run.train()
            except UserError as error:
                if error.agreed or launch.world_size == 1:  # all ranks come here: what is being written can be finished
                    run.saver.settle(run.state)
                raise

    return reporting(config.output_dir, run_to_the_end)


class _StopError(Exception):
    """A rank was asked to stop in the middle of an evaluation; raised on all ranks."""


class PretrainRun:
    """One run's state: engine, place in the sample stream, checkpoints, recorder."""

    def __init__(
        self, config: PretrainConfig, sets: TrainingSets | OnlineSets, device: torch.device, requests: StopRequests
    ):
        self.config = config
        self.num_steps = config.train.num_steps(sets.num_samples)
        self._sets = sets
        self.num_samples, self._teacher_width = sets.num_samples, sets.feature_width
        self._memory_before = peak_memory_bytes()
        resumes = agreed(bool(list_checkpoints(config.output_dir / "checkpoints")))
        self.engine = PretrainEngine(config, sets.feature_width, device, resumes)
        quantizer = MultiScaleQuantizer.load(config.tokenizer, config.model.scales)
        self.inputs = InputMaker(config.model, quantizer, config.seed, device)
        self.watchdog = Watchdog(config.guards.hang_timeout, config.output_dir)
        self.saver = RunSaver(config, self.engine, self.watchdog.beat)
        recipe = json.loads(config.model_dump_json())
        self.state = RunState(data=data_identity(config, sets), heldout=heldout_identity(config), recipe=recipe)
        self.grids: SampleGrids | None = None
        if config.log.sample_every is not None:
            samples = config.output_dir / "samples"
            tokenizer = Tokenizer.open(config.tokenizer, config.model.scales).to(device)
            alone = config.parallel.ep_size == 1
            self.grids = SampleGrids(tokenizer, samples, config.model.num_classes, config.seed, alone)
        self.requests, self.agreement = requests, Agreement(requests)
        self.bad_steps = BadSteps(config.guards.max_bad_steps, config.output_dir / "bad_batches")
        self.recorder: Recorder | None = None

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint in output_dir, if there is one. Collective."""
        loaded = self.saver.load_newest(self.state.data)
        changed = {} if loaded is None else recipe_changes(loaded.state.recipe, self.state.recipe)
        heldout_changed = loaded is not None and loaded.state.heldout not in ("", self.state.heldout)
        if loaded is not None:
            self._take_up(loaded.state)
        if heldout_changed:
            self.state.best_heldout_ce = float("inf")
        self.bad_steps.total = self.state.skipped_steps
        if not distributed.is_main():
            return
        write_text(self.config.output_dir / "resolved.yaml", dump_yaml(self.config))
        self.recorder = Recorder(self.config, self.state.step, self.num_steps, self.state.metrics_records)
        self.saver.recorder = self.recorder
        facts = {"num_steps": self.num_steps, "num_samples": self.num_samples}
        facts["memory_before_bytes"] = self._memory_before
        record_start(self.recorder, self.state.step, self.config, self.engine, self._teacher_width, facts, changed)
        if loaded is not None:
            self._warn_of_damage(loaded)
            if heldout_changed:
                line = "data.heldout_tokens has changed: what scored best on the old ones is no longer compared with"
                self.recorder.warn("heldout_changed", self.state.step, line)
            self.recorder.say(f"resumed from {loaded.path} at step {self.state.step} of {self.num_steps}")

    def _warn_of_damage(self, loaded: Loaded) -> None:
        for line in loaded.damaged if self.recorder else ():
            assert self.recorder is not None
            self.recorder.warn("damaged_checkpoint", self.state.step, line)

    def _take_up(self, state: RunState) -> None:
        """A checkpoint's place in the run, under today's recipe (whose length and logging may have changed)."""
        state.recipe, state.heldout = self.state.recipe, self.state.heldout
        self.state = state

    def train(self) -> bool:
        """Trains to the end of the recipe, or until it is stopped; returns whether it came to the end."""
        config, log = self.config, self.config.log
        stop = self._evaluate_if_due()  # a run that was stopped has saved first and left the evaluation to this start
        self.saver.export_best(self.state)
        self.records = records = StepRecords(
            config, self.num_samples, self._teacher_width, self.recorder, self.state.window
        )
        loader, batches = self._batches()
        while self.state.step < self.num_steps and not stop:
            self.agreement.begin()
            micro_batches = records.take(batches, loader)
            lr = learning_rate(config.optim, config.train.global_batch, self.state.step, self.num_steps)
            logs = (self.state.step + 1) % log.every == 0 or self.state.step + 1 == self.num_steps
            scales = scales_in_step(config.train.progressive, len(config.model.scales), self.state.step, self.num_steps)
            inputs = (self.inputs.training(batch, scales) for batch in micro_batches)
            report = self.engine.step(inputs, lr, timed=logs)
            self.state.step += 1
            self.state.position = micro_batches[-1].next_position
            stop = self.agreement.end()
            self.watchdog.beat()
            records.note(self.state.step, report, scales)
            if self._is_bad(report, micro_batches):
                self._roll_back()
                records.restart(self.state.window)
                loader, batches = self._batches()
                if stop:  # or the next start would read the same images again
                    self._save()
                continue
            if self.recorder:
                self.recorder.advance(self.state.step)
            if logs:
                records.write(self.state, report, lr, scales, loader, self.bad_steps.total)
            stop = stop or self._evaluate_if_due() or self._sample_if_due()
            if stop or self._save_is_due():
                self._save()
            else:
                self.saver.export_best(self.state)
            self.saver.report(self.state)
        finished = self.state.step >= self.num_steps and not stop
        if finished:
            self._finish()
        else:
            self._stop()
        return finished

    def _batches(self) -> tuple[Loader, Iterator[TrainingBatch]]:
        loader = Loader(self.config, self._sets, self.state.position)
        return loader, lockstep(loader)

    def _is_bad(self, report: StepReport, micro_batches: list[TrainingBatch]) -> bool:
        """Whether it is time to go back. An fp16 overflow is no bad step while the loss scale can still come down."""
        if not report.applied and self.engine.can_overflow and not any_nonfinite(report.losses):
            return False
        routers = [] if report.applied else nonfinite_routers(report.losses)
        cause = f"router logits of blocks {routers}" if routers else "the gradient"
        if not report.applied and self.recorder:
            line = f"{cause}: not finite, the step was skipped; its images: {self.bad_steps.directory}"
            self.recorder.warn("skipped_step", self.state.step, line)
        losses = [losses.total.detach() for losses in report.losses]
        return self.bad_steps.note(self.state.step, report.applied, micro_batches, losses, cause)

    def _roll_back(self) -> None:
        """The newest checkpoint's weights, but the data after those that did harm. Collective."""
        in_a_row, position, step = self.bad_steps.in_a_row, self.state.position, self.state.step
        self.saver.settle(self.state)
        best_heldout_ce = self.state.best_heldout_ce
        loaded = self.saver.load_newest(self.state.data)
        self.bad_steps.rolled_back(None if loaded is None else loaded.state.step)
        assert loaded is not None
        self._take_up(loaded.state)
        self.state.position, self.state.best_heldout_ce = position, best_heldout_ce
        if self.recorder:
            self.recorder.rewind(self.state.step, self.state.metrics_records)
            self._warn_of_damage(loaded)
            line = (
                f"gradients of {in_a_row} steps up to step {step} were not finite: back to {loaded.path.name}, "
                f"images up to position {position} are skipped"
            )
            self.recorder.warn("rollback", self.state.step, line, from_step=step, position=position)

    def _beat_or_stop(self) -> None:
        """Amid an evaluation: raises _StopError on all ranks when one is asked to stop. Collective."""
        self.watchdog.beat()
        self.agreement.begin()
        if self.agreement.end():
            raise _StopError

    def _evaluate_if_due(self) -> bool:
        """Returns whether the run was asked to stop meanwhile; the next start then evaluates."""
        step, heldout = self.state.step, self.config.data.heldout_tokens
        due = step > 0 and (step % self.config.log.evaluate_every == 0 or step == self.num_steps)
        if due and self.state.evaluated_step != step and heldout is not None:
            try:
                self._evaluate(heldout)
            except _StopError:
                return True
            self.state.evaluated_step = step
        return False

    def _evaluate(self, heldout: Path) -> None:
        """Held-out scores; the best weights so far are to go to <output_dir>/best. Collective."""
        config = self.config
        started = time.perf_counter()
        with self.engine.evaluating() as model:
            data, batch = config.data, config.log.evaluate_batch
            scores = heldout_scores(
                model, self.inputs, heldout, batch, data.num_workers, data.on_damaged, self._beat_or_stop
            )
        self.saver.settle_best(self.state)
        best = scores["ce"] < self.state.best_heldout_ce
        if best:
            self.saver.note_best(self.state.step, scores["ce"])
        if self.recorder:
            values = {"best": best, **scores, "seconds": time.perf_counter() - started}
            self.recorder.record("heldout", self.state.step, values)
            self.recorder.say(
                f"step {self.state.step}  held-out ce {scores['ce']:.4f}, last scale {scores['ce_last']:.4f}"
                + ("  (best so far, exporting the weights)" if best else "")
            )

    def _sample_if_due(self) -> bool:
        """Returns whether the run was asked to stop meanwhile; there is no such picture then."""
        every, step = self.config.log.sample_every, self.state.step
        if self.grids is None or every is None or step % every:
            return False
        try:
            with self.engine.evaluating() as model:
                path = self.grids.write(model, step, self._beat_or_stop)
        except _StopError:
            return True
        except UnwrittenError as error:  # on the main rank, when all ranks are done
            if self.recorder:
                self.recorder.warn("write_failed", step, f"a picture could not be written ({error})", what="samples")
            return False
        except UserError as error:  # of weights that are not finite, on every rank
            if self.recorder:
                self.recorder.warn("samples_failed", step, f"no picture: {error}")
            return False
        if self.recorder:
            where = str(path.relative_to(self.config.output_dir))
            self.recorder.record("samples", step, {"path": where, "classes": self.grids.classes})
            self.recorder.say(f"step {step}  picture: {path}, {self.grids.shown}")
        return False

    def _save_is_due(self) -> bool:
        """Not amid bad steps: going back to such a checkpoint would not help."""
        step = self.state.step
        return step == self.num_steps or (step % self.config.log.checkpoint_every == 0 and not self.bad_steps.in_a_row)

    def _save(self) -> None:
        self.state.skipped_steps, self.state.window = self.bad_steps.total, self.records.cut()
        self.saver.save(self.state)

    def _stop(self) -> None:
        """Everything is on disk: leaves word for whoever starts the run again."""
        self.saver.settle(self.state)
        self.watchdog.stop()
        if self.recorder:
            reason, step = self.requests.reason, self.state.step
            line = stopped(step, self.num_steps, reason, self.saver.last_step_saved)
            self.recorder.close("requeue", step, line, reason=reason or "another rank")

    def _finish(self) -> None:
        """Exports the last weights. Nothing happens when a finished run is started again, but a line that says so."""
        self.saver.export_last(self.state)
        self.watchdog.stop()
        if self.recorder:
            last = self.config.output_dir / "last"
            self.recorder.close("finished", self.state.step, f"done: {self.state.step} steps, weights in {last}")
