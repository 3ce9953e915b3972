"""Training of the multi-scale tokenizer: `mepa train-tokenizer`.

The output directory holds `config.json` and `model.safetensors` (Tokenizer.load) once training has finished,
`metrics.jsonl`, `reconstructions/`, `resolved.yaml`, and `checkpoint.pt` to resume from.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from mepa_ds import distributed
from mepa_ds.config.base import dump_yaml
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data.images import ImageBatch, image_batches
from mepa_ds.data.index import ShardIndex
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, write_text
from mepa_ds.loops.tokenizer_evaluation import evaluate_tokenizer, save_image
from mepa_ds.loops.tokenizer_trainer import TokenizerTrainer
from mepa_ds.metrics import MetricsWriter
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.tokenizer.discriminator import PatchDiscriminator
from mepa_ds.weights import load_strict

CHECKPOINT_NAME = "checkpoint.pt"
# A resumed run may change how it runs and how long, not what it computes.
_FIXED = ("seed", "tokenizer", "loss", "codebook", "optim", "precision")


def train_tokenizer(config: TokenizerTrainingConfig) -> None:
    """Trains to the end of the recipe, from the last checkpoint if there is one. Collective.

    Raises:
        UserError: on every rank, before any step, if the recipe does not fit the ranks, the shards, or the checkpoint.
    """
    device = distributed.start(distributed.read_launch())
    trainer = _agree_on_trainer(config, device)
    if trainer.step_index >= trainer.num_steps:
        _say(f"tokenizer: {config.output_dir} is finished ({trainer.step_index} steps); nothing to do")
        return
    if trainer.step_index:
        _say(f"tokenizer: resuming {config.output_dir} at step {trainer.step_index} of {trainer.num_steps}")
    if distributed.is_main():
        write_text(config.output_dir / "resolved.yaml", dump_yaml(config))
    _Loop(config, trainer).run()


class _Loop:
    """Steps, records, evaluations and checkpoints."""

    def __init__(self, config: TokenizerTrainingConfig, trainer: TokenizerTrainer):
        self.config, self.trainer = config, trainer
        # rank 0 alone writes
        path = config.output_dir / "metrics.jsonl"
        self.writer = MetricsWriter(path, trainer.step_index) if distributed.is_main() else None

    def run(self) -> None:
        trainer, log = self.trainer, self.config.log
        batches = self._training_batches()
        progress = tqdm(
            total=trainer.num_steps, initial=trainer.step_index, desc="tokenizer", unit="step",
            disable=not distributed.is_main(), mininterval=1.0,
        )  # fmt: skip
        since, since_step = time.perf_counter(), trainer.step_index
        while trainer.step_index < trainer.num_steps:
            trainer.step(batches)
            progress.update()
            last = trainer.step_index == trainer.num_steps
            if last or trainer.step_index % log.every == 0:
                trainer.check_finite()
                record = trainer.metrics()
                seconds = time.perf_counter() - since
                images = (trainer.step_index - since_step) * self.config.train.global_batch
                record |= {"lr": trainer.lr_at(trainer.step_index - 1), "images_per_second": images / seconds}
                self._write("train", record)
                progress.set_postfix(loss=f"{record['loss']:.4f}", codes=f"{100 * record['codebook_use']:.0f}%")
                since, since_step = time.perf_counter(), trainer.step_index
            if last or trainer.step_index % log.evaluate_every == 0:
                self._evaluate(progress)
            if last:
                self._finish()
            if last or trainer.step_index % log.checkpoint_every == 0:
                self._save()
        progress.close()

    def _training_batches(self) -> Iterator[ImageBatch]:
        return image_batches(
            self.config.data.images,
            batch_size=self.trainer.local_batch,
            image_side=self.config.tokenizer.image_side,
            seed=self.config.seed,
            position=self.trainer.position,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.config.data.num_workers,
        )

    def _evaluate(self, progress: tqdm[Any]) -> None:
        if self.config.data.heldout_images is None:
            return
        batches = image_batches(
            self.config.data.heldout_images,
            batch_size=self.trainer.local_batch,
            image_side=self.config.tokenizer.image_side,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.config.data.num_workers,
            train=False,
        )
        metrics, grid = evaluate_tokenizer(self.trainer.tokenizer, batches, self.config.log.evaluate_images)
        self._write("heldout", metrics)
        if distributed.is_main():
            save_image(grid, self.config.output_dir / "reconstructions" / f"step-{self.trainer.step_index:08d}.png")
            save_image(grid, self.config.output_dir / "reconstructions.png")
            progress.write(
                f"step {self.trainer.step_index}: held-out PSNR {metrics['psnr']:.2f} dB on {metrics['num_images']} "
                f"images, {100 * metrics['codebook_use']:.0f} % of the codes in use"
            )

    def _finish(self) -> None:
        if distributed.is_main():
            self.trainer.tokenizer.save_pretrained(self.config.output_dir)

    def _save(self) -> None:
        self.trainer.check_finite()
        if distributed.is_main():
            state = {**self.trainer.state_dict(), "config": self.config.model_dump_json()}
            with atomic_path(self.config.output_dir / CHECKPOINT_NAME) as temporary:
                torch.save(state, temporary)
        if dist.is_initialized():
            dist.barrier()

    def _write(self, event: str, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        trainer = self.trainer
        self.writer.write({"event": event, "step": trainer.step_index, "samples": trainer.position, **record})


def _agree_on_trainer(config: TokenizerTrainingConfig, device: torch.device) -> TokenizerTrainer:
    """Builds the trainer, and resumes it; an error on any rank is raised on all."""
    trainer: TokenizerTrainer | None = None
    error: UserError | None = None
    try:
        trainer = _build_trainer(config, device)
    except UserError as found:
        error = found
    distributed.agree(error)
    assert trainer is not None
    return trainer


def _build_trainer(config: TokenizerTrainingConfig, device: torch.device) -> TokenizerTrainer:
    num_samples = ShardIndex.read(config.data.images, "data.images").num_samples
    if config.data.heldout_images is not None:
        ShardIndex.read(config.data.heldout_images, "data.heldout_images")
    batch, accumulation, world_size = config.train.global_batch, config.train.accumulation, distributed.world_size()
    if batch % (accumulation * world_size):
        raise UserError(
            f"train.global_batch ({batch}) must be a multiple of {world_size} ranks x train.accumulation "
            f"({accumulation}) = {world_size * accumulation}"
        )
    if config.loss.adversarial is not None:
        smallest = PatchDiscriminator.smallest_side(config.loss.adversarial.num_layers)
        if config.tokenizer.image_side < smallest:
            raise UserError(
                f"loss.adversarial.num_layers ({config.loss.adversarial.num_layers}) needs images of at least "
                f"{smallest} pixels, but the tokenizer makes {config.tokenizer.image_side}; use fewer layers"
            )
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.tokenizer)
    checkpoint = _read_checkpoint(config)
    if checkpoint is None and config.start_from is not None:
        _start_from(tokenizer, config.start_from)
    trainer = TokenizerTrainer(config, tokenizer, config.train.num_steps(num_samples), device)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    return trainer


def _start_from(tokenizer: Tokenizer, path: Path) -> None:
    source = Tokenizer.open(path, tokenizer.config.scales)
    load_strict(tokenizer, source.state_dict(), f"start_from: {path}")


def _read_checkpoint(config: TokenizerTrainingConfig) -> dict[str, Any] | None:
    path = config.output_dir / CHECKPOINT_NAME
    if not path.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: not a checkpoint of this program ({error}); remove it to start anew") from error
    old, new = json.loads(checkpoint["config"]), json.loads(config.model_dump_json())
    changed = [key for key in _FIXED if old[key] != new[key]]
    if old["train"]["global_batch"] != new["train"]["global_batch"]:
        changed.append("train.global_batch")
    if changed:
        raise UserError(
            f"{path} was made by another recipe: {', '.join(changed)} changed since (its recipe is in resolved.yaml). "
            "Change it back to resume, or give another output_dir"
        )
    return checkpoint


def _say(message: str) -> None:
    if distributed.is_main():
        print(message, flush=True)
