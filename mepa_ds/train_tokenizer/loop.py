"""The training loop of the multi-scale tokenizer: `mepa train-tokenizer`.

The output directory holds `metrics.jsonl`, `reconstructions/`, `resolved.yaml`, `status.json`, and `checkpoint.pt` to
resume from. Once training has finished, it also holds `config.json` and `model.safetensors` (Tokenizer.load).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mepa_ds import distributed, log
from mepa_ds.config.base import dump_yaml
from mepa_ds.config.changes import changes_in_words, recipe_changes
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data.images import ImageBatch, image_batches, images_once
from mepa_ds.data.lockstep import lockstep, report_damaged
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.remote.schemes import allow
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import images_identity
from mepa_ds.distributed import sum_over_ranks
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.images.pictures import save_png
from mepa_ds.runtime.output import owned
from mepa_ds.runtime.schedule import check_phases
from mepa_ds.runtime.stopping import Agreement, StopRequests, stopped, undisturbed
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.tokenizer.discriminator import PatchDiscriminator
from mepa_ds.tokenizer.tokenizer_files import KIND
from mepa_ds.train_tokenizer.checkpoint import read_checkpoint, write_checkpoint
from mepa_ds.train_tokenizer.evaluation import evaluate_tokenizer, reconstruction_sheet
from mepa_ds.train_tokenizer.records import TokenizerRecords
from mepa_ds.train_tokenizer.trainer import TokenizerTrainer
from mepa_ds.weights.directories import check_no_other_model, load_strict
from mepa_ds.weights.state_dict_files import WEIGHTS_NAME


def train_tokenizer(config: TokenizerTrainingConfig, requests: StopRequests) -> bool:
    """Trains to the end of the recipe, from the last checkpoint if there is one. Collective.

    Returns whether the run is finished. If it is not, a signal has stopped it, and it has been saved.

    Raises:
        UserError: on every rank, before any step, if the recipe does not fit the ranks, the shards, or the checkpoint.
    """
    launch = distributed.read_launch()
    config.check_world(launch.world_size)
    with undisturbed():
        device = distributed.start(launch)
    with owned(config.output_dir):
        return _train(config, device, requests)


def _train(config: TokenizerTrainingConfig, device: torch.device, requests: StopRequests) -> bool:
    start = _agree_on_start(config, device)
    trainer = start.trainer
    if trainer.step_index >= trainer.num_steps:
        if distributed.is_main() and not (config.output_dir / WEIGHTS_NAME).exists():
            trainer.tokenizer.save_pretrained(config.output_dir)
        _say(f"tokenizer: {config.output_dir} is finished ({trainer.step_index} steps); nothing to do")
        return True
    if trainer.step_index:
        _say(f"tokenizer: resuming {config.output_dir} at step {trainer.step_index} of {trainer.num_steps}")
    if start.changes:
        _say(f"tokenizer: {changes_in_words(start.changes)}")
    if distributed.is_main():
        write_text(config.output_dir / "resolved.yaml", dump_yaml(config))
    return _Loop(config, start, requests).run(start.unevaluated)


class _Start(NamedTuple):
    """The state from which a run begins or continues."""

    trainer: TokenizerTrainer
    images: str
    """Names the training images and their order."""
    num_images: int
    """Training images in the set."""
    unevaluated: bool
    """Whether the run was stopped before the evaluation of this step."""
    num_replaced: int
    """Damaged images since the last record, over all ranks."""
    changes: dict[str, list[Any]]
    """Changes of the recipe since the checkpoint."""


class _Loop:
    """Takes steps, and writes records, evaluations and checkpoints."""

    def __init__(self, config: TokenizerTrainingConfig, start: _Start, requests: StopRequests):
        self.config, self.trainer, self.images = config, start.trainer, start.images
        self.requests, self.agreement = requests, Agreement(requests)
        # Damaged images since the last record. On the main rank the count includes the total of the checkpoint.
        self.num_replaced = start.num_replaced if distributed.is_main() else 0
        anew = "heldout" if start.unevaluated else None
        trainer = start.trainer
        self.records = TokenizerRecords(config, trainer.step_index, trainer.num_steps, start.num_images, anew)
        if start.changes:
            self._write("recipe_changed", {"changes": start.changes})

    def run(self, unevaluated: bool) -> bool:
        """Trains; returns whether the run is finished. unevaluated: the step it starts from is evaluated first."""
        trainer, log = self.trainer, self.config.log
        self.records.status("running", trainer.step_index)
        batches = self._training_batches()
        stop = unevaluated and not self._evaluate()
        since_step, seconds = trainer.step_index, 0.0
        while trainer.step_index < trainer.num_steps and not stop:
            began = time.perf_counter()
            self.agreement.begin()
            trainer.step(batches)
            stop = self.agreement.end()
            self.records.advance(trainer.step_index)
            seconds += time.perf_counter() - began
            last = trainer.step_index == trainer.num_steps
            if last or trainer.step_index % log.every == 0:
                trainer.check_finite()
                record = trainer.metrics()
                steps = trainer.step_index - since_step
                images = steps * self.config.train.global_batch
                record |= {"lr": trainer.lr_at(trainer.step_index - 1), "images_per_second": images / seconds}
                if self.config.data.on_damaged == "skip":
                    record["replaced_samples"], self.num_replaced = self._all_replaced(), 0
                self.records.training(trainer.step_index, trainer.position, record, seconds / steps)
                since_step, seconds = trainer.step_index, 0.0
            evaluation_due = last or trainer.step_index % log.evaluate_every == 0
            if evaluation_due and (last or not stop):
                stop = not self._evaluate(to_the_end=last)
            if last:
                self._finish()
            if last or stop or trainer.step_index % log.checkpoint_every == 0:
                self._save(unevaluated=evaluation_due and stop and not last)
        self.records.close()
        finished = trainer.step_index >= trainer.num_steps
        if not finished:
            step = trainer.step_index
            _say(f"tokenizer: {stopped(step, trainer.num_steps, self.requests.reason, from_step=step)}")
        reason = {} if finished else {"reason": self.requests.reason or "another rank"}
        self.records.status("finished" if finished else "requeue", trainer.step_index, **reason)
        return finished

    def _training_batches(self) -> Iterator[ImageBatch]:
        batches = image_batches(
            self.config.data.images,
            batch_size=self.trainer.local_batch,
            image_side=self.config.tokenizer.image_side,
            seed=self.config.seed,
            position=self.trainer.position,
            ranks=distributed.ranks(),
            options=LoaderOptions(num_workers=self.config.data.num_workers, on_damaged=self.config.data.on_damaged),
        )
        for batch in lockstep(batches):
            report_damaged(batch.damaged)
            self.num_replaced += len(batch.damaged)
            yield batch

    def _all_replaced(self) -> int:
        """Returns how many damaged images were replaced since the last record, on all ranks. Collective."""
        return int(sum_over_ranks(torch.tensor(self.num_replaced, device=self.trainer.device)))

    def _evaluate(self, to_the_end: bool = False) -> bool:
        """Evaluates the tokenizer. Returns False, on every rank, if a rank was asked to stop meanwhile."""
        if self.config.data.heldout_images is None:
            return True
        batches = images_once(
            self.config.data.heldout_images,
            batch_size=self.trainer.local_batch,
            image_side=self.config.tokenizer.image_side,
            ranks=distributed.ranks(),
            num_workers=self.config.data.num_workers,
        )
        evaluated = evaluate_tokenizer(
            self.trainer.tokenizer,
            batches,
            self.config.log.evaluate_images,
            lambda: not to_the_end and self.requests.reason is not None,
        )
        if evaluated is None:
            return False
        metrics, shown = evaluated
        self._write("heldout", metrics)
        if distributed.is_main():
            try:
                title = f"step {self.trainer.step_index}, held-out PSNR {metrics['psnr']:.2f} dB"
                picture = reconstruction_sheet(shown, title)
                directory = self.config.output_dir
                save_png(picture, directory / "reconstructions" / f"step-{self.trainer.step_index:08d}.png")
                save_png(picture, directory / "reconstructions.png")
            except Exception as error:  # a picture that fails does not end a run
                self.records.say(f"warning: a picture could not be written ({error})")
            self.records.say(
                f"step {self.trainer.step_index}: held-out PSNR {metrics['psnr']:.2f} dB on {metrics['num_images']} "
                f"images, {100 * metrics['codebook_use']:.0f} % of the codes in use"
            )
        return True

    def _finish(self) -> None:
        if distributed.is_main():
            self.trainer.tokenizer.save_pretrained(self.config.output_dir)

    def _save(self, unevaluated: bool) -> None:
        self.trainer.check_finite()
        state = {**self.trainer.state_dict(), "num_replaced": self._all_replaced(), "unevaluated": unevaluated}
        error: UserError | None = None
        if distributed.is_main():
            try:
                write_checkpoint(self.config, state | {"images": self.images})
            except UserError as failure:
                error = failure
        distributed.agree(error)

    def _write(self, event: str, record: dict[str, Any]) -> None:
        self.records.write(event, self.trainer.step_index, self.trainer.position, record)


def _agree_on_start(config: TokenizerTrainingConfig, device: torch.device) -> _Start:
    """Builds and resumes the trainer; an error on any rank is raised on all ranks."""
    start: _Start | None = None
    error: UserError | None = None
    try:
        check_no_other_model(config.output_dir, KIND)
        start = _start(config, device)
    except UserError as found:
        error = found
    distributed.agree(error)
    assert start is not None
    steps = distributed.of_all(start.trainer.step_index)
    if len(set(steps)) > 1:  # a network file system shows another node's new file late
        raise UserError(
            f"output_dir: {config.output_dir}: ranks found checkpoints of steps {sorted(set(steps))}; start again",
            agreed=True,
        )
    return start


def _start(config: TokenizerTrainingConfig, device: torch.device) -> _Start:
    allow(config.data.remote_schemes)
    shards = ShardSet(config.data.images, "data.images")
    images = images_identity(shards.index) + (f", shuffled by {shards.window} shards" if shards.window else "")
    if config.data.heldout_images is not None:
        ShardSet(config.data.heldout_images, "data.heldout_images")
    if config.loss.adversarial is not None:
        smallest = PatchDiscriminator.smallest_side(config.loss.adversarial.num_layers)
        if config.tokenizer.image_side < smallest:
            raise UserError(
                f"loss.adversarial.num_layers ({config.loss.adversarial.num_layers}) needs images of at least "
                f"{smallest} pixels, but the tokenizer makes {config.tokenizer.image_side}; use fewer layers"
            )
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.tokenizer)
    checkpoint = read_checkpoint(config, images)
    if checkpoint is None and config.start_from is not None:
        _start_from(tokenizer, config.start_from)
    num_steps = config.train.num_steps(len(shards))
    check_phases(config.optim, num_steps)
    trainer = TokenizerTrainer(config, tokenizer, num_steps, device)
    if checkpoint is None:
        return _Start(trainer, images, len(shards), unevaluated=False, num_replaced=0, changes={})
    trainer.load_state_dict(checkpoint)
    changes = recipe_changes(json.loads(checkpoint["config"]), json.loads(config.model_dump_json()))
    return _Start(trainer, images, len(shards), checkpoint["unevaluated"], checkpoint["num_replaced"], changes)


def _start_from(tokenizer: Tokenizer, path: Path) -> None:
    source = Tokenizer.open(path, tokenizer.config.scales)
    if source.config.phi_ratio != tokenizer.config.phi_ratio:  # the shapes of the weights do not show phi_ratio
        raise UserError(
            f"start_from: {path} was trained with phi_ratio {source.config.phi_ratio}, and the recipe says "
            f"{tokenizer.config.phi_ratio}; set tokenizer.phi_ratio={source.config.phi_ratio}"
        )
    load_strict(tokenizer, source.state_dict(), f"start_from: {path}")


def _say(message: str) -> None:
    if distributed.is_main():
        log.say(message, flush=True)
