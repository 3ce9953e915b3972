"""The pretraining run, read from top to bottom: check, build, resume, train, evaluate, save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.config.base import dump_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.training import TrainingBatch, TrainingSets, open_training_sets, training_batches
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.checkpoint import RunState, export_weights, list_checkpoints, load_checkpoint, save_checkpoint
from mepa_ds.engine.engine import PretrainEngine, StepReport
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.loops.evaluation import heldout_scores
from mepa_ds.loops.inputs import InputMaker
from mepa_ds.loops.recorder import Recorder, peak_memory_bytes
from mepa_ds.loops.reports import reduce_losses, routing_report, score_report
from mepa_ds.loops.schedule import learning_rate
from mepa_ds.loops.stopping import Agreement, StopRequests, deadline
from mepa_ds.models.summary import count_parameters
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer import identity_of


def pretrain(config: PretrainConfig, requests: StopRequests) -> bool:
    """Runs, or resumes, the recipe on all ranks that the launcher started. Collective.

    Returns whether the run is finished; if not, a signal or a time limit has stopped it, and it has been saved.

    Raises UserError, on every rank, before anything is trained, when the recipe does not fit data or ranks.
    """
    launch = distributed.read_launch()
    config.check_world(launch.world_size)
    deepspeed_config.read_knobs(config.parallel.deepspeed)
    device = distributed.start(launch)
    requests.stop_at(deadline(config.guards.time_limit, config.guards.stop_before_end, os.environ))
    sets = _open_checked(config)
    run = PretrainRun(config, sets, device, requests)
    run.resume()
    return run.train()


def _open_checked(config: PretrainConfig) -> TrainingSets:
    """Opens the shard sets; every rank leaves together when one of them cannot."""
    error: UserError | None = None
    sets: TrainingSets | None = None
    try:
        sets = open_training_sets(config.data.tokens, config.data.features)
        check_sets(config, sets)
        if config.data.heldout_tokens is not None:
            check_sets(config, open_training_sets(config.data.heldout_tokens, None), "data.heldout_tokens")
    except UserError as raised:
        error = raised
    distributed.agree(error)
    assert sets is not None
    return sets


def check_sets(config: PretrainConfig, sets: TrainingSets, key: str = "data.tokens") -> None:
    """Raises UserError unless the tokens are the run's tokenizer's and fit the model."""
    identity = identity_of(config.tokenizer)
    if sets.tokenizer.identity != identity:
        raise UserError(
            f"{key}: {sets.tokens.directory} was made by tokenizer {sets.tokenizer.name!r} "
            f"({sets.tokenizer.identity}), but tokenizer: {config.tokenizer} is {identity}; precompute "
            f"the tokens again with that tokenizer (data_tools/precompute.py tokens), or point tokenizer: to the one that made them"
        )
    model = config.model
    facts = (("scales", sets.scales, model.scales), ("codebook_size", sets.codebook_size, model.codebook_size))
    for name, theirs, ours in facts:
        if theirs != ours:
            raise UserError(f"model.{name}: {ours}, but {key} {sets.tokens.directory} has {theirs}; set model.{name}")
    if sets.num_classes and sets.num_classes != model.num_classes:
        raise UserError(
            f"model.num_classes: {model.num_classes}, but {key} {sets.tokens.directory} has {sets.num_classes} classes"
        )


class PretrainRun:
    """One run's state: engine, place in the sample stream, recorder."""

    def __init__(self, config: PretrainConfig, sets: TrainingSets, device: torch.device, requests: StopRequests):
        self.requests = requests
        self.agreement = Agreement(requests)
        self.config = config
        self.num_steps = config.train.num_steps(sets.num_samples)
        self.num_samples = sets.num_samples
        self.checkpoints = config.output_dir / "checkpoints"
        self.engine = PretrainEngine(config, sets.feature_width, device)
        self.inputs = InputMaker(config.model, MultiScaleQuantizer.load(config.tokenizer), config.seed, device)
        model = json.loads(config.model.model_dump_json())
        self.state = RunState(
            step=0, position=0, adam_step=0, best_heldout_ce=float("inf"), evaluated_step=0, model=model
        )
        self.recorder: Recorder | None = None
        self._saved_step = 0

    def resume(self) -> None:
        """Goes on from the newest checkpoint in output_dir, if there is one."""
        found = list_checkpoints(self.checkpoints)
        if found:
            self.state = load_checkpoint(self.engine, found[-1])
            self._saved_step = self.state.step
        if not distributed.is_main():
            return
        config = self.config
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(config.output_dir / "resolved.yaml", dump_yaml(config))
        self.recorder = Recorder(config, self.state.step, self.num_steps)
        counts = count_parameters(config.model)
        facts = {
            "world_size": distributed.world_size(),
            "ep_size": config.parallel.ep_size,
            "zero_stage": deepspeed_config.zero_stage(config.parallel.deepspeed),
            "precision": config.parallel.precision,
            "num_steps": self.num_steps,
            "num_samples": self.num_samples,
            "total_parameters": counts.total,
            "active_parameters": counts.active,
        }
        self.recorder.record("start", self.state.step, facts)
        projector = self.engine.objective.projector
        head = sum(parameter.numel() for parameter in projector.parameters()) if projector is not None else 0
        self.recorder.say(
            f"model: {counts}, guidance projector {head / 1e6:.1f}M apart; {facts['world_size']} ranks, "
            f"ep_size {facts['ep_size']}, ZeRO-{facts['zero_stage']}, {facts['precision']}; {self.num_steps} steps of "
            f"{config.train.global_batch} images, {self.num_samples} images an epoch"
        )
        if found:
            self.recorder.say(f"resumed from {found[-1]} at step {self.state.step} of {self.num_steps}")

    def train(self) -> bool:
        """Trains to the end of the recipe, or until it is stopped; returns whether it came to the end."""
        log = self.config.log
        self._evaluate_if_due()  # a run that was stopped saves first and leaves the evaluation to the next start
        batches = self._batches()
        stop = False
        while self.state.step < self.num_steps and not stop:
            self.agreement.begin()
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.config.train.accumulation)]
            waited = time.perf_counter() - started
            lr = learning_rate(self.config.optim, self.config.train.global_batch, self.state.step, self.num_steps)
            report = self.engine.step(map(self.inputs.training, micro_batches), lr)
            self.state.step += 1
            self.state.position = micro_batches[-1].next_position
            last = self.state.step == self.num_steps
            stop = self.agreement.end()
            if self.recorder:
                self.recorder.advance()
            if self.state.step % log.every == 0 or last:
                self._record(report, lr, time.perf_counter() - started, waited)
            if not stop:
                self._evaluate_if_due()
            if self.state.step % log.checkpoint_every == 0 or last or stop:
                self._save()
        finished = self.state.step == self.num_steps
        if finished:
            self._finish()
        else:
            self._stop()
        dist.barrier()  # a launcher ends the other ranks when the first one exits
        return finished

    def _batches(self) -> Iterator[TrainingBatch]:
        """This rank's share of one micro-batch after the other; which images share one does not depend on the ranks."""
        config = self.config
        return training_batches(
            config.data.tokens,
            config.data.features if config.objective.alignment is not None else None,
            global_batch=config.train.global_batch // config.train.accumulation,
            seed=config.seed,
            position=self.state.position,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _record(self, report: StepReport, lr: float, seconds: float, waited: float) -> None:
        """Reduces the step's numbers over the ranks and writes them. Collective."""
        terms, scores, routing = reduce_losses(report.losses)
        if self.recorder is None:
            return
        images = self.config.train.global_batch
        values = {
            "epoch": self.state.position / self.num_samples,
            "images": self.state.position,
            "lr": lr,
            "grad_norm": report.grad_norm,
            "applied": report.applied,
            "loss": terms.pop("total"),
            **terms,
            **{key: value for key, value in score_report(scores).items() if key not in terms},
            "step_seconds": seconds,
            "data_seconds": waited,
            "images_per_second": images / seconds,
            "tokens_per_second": images * self.config.model.schedule.num_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.recorder.training(self.state.step, values)
        if routing:
            layers = {str(layer): routing_report(statistics) for layer, statistics in routing.items()}
            self.recorder.record("routing", self.state.step, {"layers": layers})

    def _evaluate_if_due(self) -> None:
        step = self.state.step
        due = step > 0 and (step % self.config.log.evaluate_every == 0 or step == self.num_steps)
        if due and self.state.evaluated_step != step and self.config.data.heldout_tokens is not None:
            self._evaluate(self.config.data.heldout_tokens)
            self.state.evaluated_step = step

    def _evaluate(self, heldout_tokens: Path) -> None:
        """Held-out scores; the best weights so far go to <output_dir>/best. Collective."""
        config = self.config
        started = time.perf_counter()
        with self.engine.evaluating() as model:
            scores = heldout_scores(
                model, self.inputs, heldout_tokens, config.log.evaluate_batch, config.data.num_workers
            )
        best = scores["ce"] < self.state.best_heldout_ce
        if best:
            self.state.best_heldout_ce = scores["ce"]
            export_weights(self.engine, config.output_dir / "best")
        if self.recorder:
            values = {"best": best, **scores, "seconds": time.perf_counter() - started}
            self.recorder.record("heldout", self.state.step, values)
            self.recorder.say(
                f"step {self.state.step}  held-out ce {scores['ce']:.4f}, last scale {scores['ce_last']:.4f}"
                + ("  (best so far, weights exported)" if best else "")
            )

    def _save(self) -> None:
        save_checkpoint(self.engine, self.state, self.checkpoints, self.config.log.keep_checkpoints)
        self._saved_step = self.state.step

    def _stop(self) -> None:
        """Everything is saved: leaves word for whoever starts the run again."""
        if self.recorder:
            reason = self.requests.reason or "another rank was asked to stop"
            line = f"stopped at step {self.state.step} of {self.num_steps} ({reason}); start again to go on"
            self.recorder.close("requeue", self.state.step, line)

    def _finish(self) -> None:
        """Exports the last weights. Nothing happens when a finished run is started again, but a line that says so."""
        last = self.config.output_dir / "last"
        if self._saved_step != self.num_steps or not last.exists():
            export_weights(self.engine, last)
        if self.recorder:
            self.recorder.close("finished", self.state.step, f"done: {self.state.step} steps, weights in {last}")
