"""The recipe of a pretraining run: everything that `pretrain.py` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.objective import ObjectiveConfig
from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.config.values import Minutes, PathOrHub, PositiveInt, RemoteScheme, Seconds, UserPath
from mepa_ds.errors import UserError


class OnlineTeacher(Section):
    """The teacher that runs beside the model."""

    name: str
    """As for mepa data precompute: dinov2-s|b|l|g[-reg], dinov3-..., any plain ViT of timm, or one that fit-teacher
    made."""
    weights: PathOrHub
    """Local checkpoint (a file or directory of timm, the authors or the transformers library, or the directory that
    fit-teacher wrote), or `hub` to let timm download it."""


class DataConfig(Section):
    """Sibling shard sets that `mepa data precompute` wrote (tokens, features), or images, encoded at every step."""

    tokens: UserPath | None = None
    """Token maps of the training images (a directory with index.json). Give tokens or images."""
    features: UserPath | None = None
    """Teacher features of the same images; needed by semantic guidance."""
    images: UserPath | None = None
    """Training images, encoded by the tokenizer at every step; cropped at random unless stored at its side."""
    teacher: OnlineTeacher | None = None
    """Gives features of data.images at every step; needed by semantic guidance"""
    heldout_tokens: UserPath | None = None
    """Token maps of held-out images; null: no evaluation."""
    unique_images: PositiveInt | None = None
    """Train on that many images of the set, drawn once by the seed, and count epochs over them; null: on all."""
    on_damaged: Literal["stop", "skip"] = "stop"
    """A sample that cannot be read: end the run with its name, or put the next one in its place, log it and count."""
    remote_schemes: tuple[RemoteScheme, ...] = ()
    """What remote.json of a set may name beside the web and stores; `pipe` runs its shell commands. Only for sets that
    you trust."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Loader threads a rank (data.images: processes); the order of samples does not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tokens is None) == (self.images is None):
            raise ValueError("data: give one of tokens (a precomputed set) and images (encoded at every step)")
        if self.features is not None and self.tokens is None:
            raise ValueError("data.features: belong to data.tokens; with data.images set data.teacher")
        if self.teacher is not None and self.images is None:
            raise ValueError("data.teacher: runs on data.images; with data.tokens set data.features")
        return self


class TrainConfig(Section):
    """How long, and with what batch."""

    global_batch: PositiveInt = 768
    """Images a step over all ranks."""
    accumulation: PositiveInt = 1
    """Micro-batches a step on each rank."""
    epochs: PositiveInt | None = None
    """Length of the run in passes over the data. Give epochs, steps or samples."""
    steps: PositiveInt | None = None
    """Length of the run in optimizer steps. Give epochs, steps or samples."""
    samples: PositiveInt | None = None
    """Length of the run in images, counted as often as they are seen. Give epochs, steps or samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(length is not None for length in (self.epochs, self.steps, self.samples)) != 1:
            raise ValueError("give one of epochs, steps and samples")
        return self

    def num_steps(self, num_samples: int) -> int:
        """Steps of the whole run; a last, partly filled step belongs to it."""
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else (self.epochs or 0) * num_samples
        return -(-samples // self.global_batch)


class PretrainTrainConfig(TrainConfig):
    """How long, and with what batch."""

    progressive: Annotated[float, Field(gt=0, le=1)] | None = None
    """Start with half of the scales; the others join until this share of the steps (VAR's pg); null: all at once."""


class ParallelConfig(Section):
    """How the run is spread over ranks, and in what precision."""

    ep_size: PositiveInt = 1
    """Ranks that share one set of experts; divides num_experts and the number of ranks."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of weights and activations; optimizer masters are fp32 always."""
    activation_checkpointing: Literal["none", "selective", "blocks"] = "none"
    """Keep for the backward pass: all; matrix products, attention and routing; blocks' inputs and routing."""
    compile: bool | None = None
    """torch.compile the blocks, except for the way of tokens to their experts; not with activation checkpointing. null:
    on GPUs, where a compiler works."""
    deepspeed: UserPath = Path("ds_configs/zero2.json")
    """DeepSpeed's engine knobs (ZeRO stage, bucket sizes); batch, precision and clipping come from the recipe. Those
    of ds_configs/ are found from any directory."""

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.compile and self.activation_checkpointing != "none":
            raise ValueError(
                f"compile and activation_checkpointing ({self.activation_checkpointing}) exclude each other: a "
                "recomputation must repeat the forward pass exactly, and compiled code may not; turn one of them off"
            )
        return self


class ScoreConfig(Section):
    """Scores of generated images during training, by the code and the protocol of `mepa evaluate`."""

    reference: UserPath
    """Real images to compare with: an .npz, a folder of images or a shard set."""
    images: Annotated[int, Field(ge=5)] = 1000
    """Images that are generated, the same number of each class as far as it divides."""
    features: Annotated[tuple[str, ...], Field(min_length=1)] = ("inception",)
    """Feature spaces of the Frechet distance: inception, teacher:NAME[:WEIGHTS], patch-pca:DIR, classifier:DIR."""
    classifier: UserPath | None = None
    """A classifier of `mepa evaluate --fit-classifier`, for the share of images that show the class asked for."""
    inception: UserPath | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for the feature space inception."""
    cfg: Annotated[float, Field(ge=0)] = 1.5
    """Guidance when sampling."""
    top_k: Annotated[int, Field(ge=0)] = 900
    """Draw from the k most probable codes; 0 is no limit."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.96
    """Draw from the most probable codes that together have this probability; 0 is no limit."""
    batch: PositiveInt = 50
    """Images at a time on each rank."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "inception" in self.features and self.inception is None:
            raise ValueError("the feature space inception needs log.score.inception, the network's weights")
        return self


class LogConfig(Section):
    """What is written, and when (in steps)."""

    every: PositiveInt = 50
    """A record in metrics.jsonl and a line in the log."""
    evaluate_every: PositiveInt = 1000
    """Held-out cross-entropy; the best weights are exported to <output_dir>/best."""
    evaluate_batch: PositiveInt = 64
    """Images a rank and forward pass in evaluation."""
    sample_every: PositiveInt | None = None
    """A grid of sampled images, one row a class (8 of more than 16), in <output_dir>/samples; null: none."""
    score_every: PositiveInt | None = None
    """Scores of generated images (log.score says how), also after the last step; null: none."""
    score: ScoreConfig | None = None
    """How generated images are scored"""
    checkpoint_every: PositiveInt = 1000
    """A checkpoint that any number of ranks can resume from."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    keep_steps: tuple[PositiveInt, ...] = ()
    """Checkpoints of exactly these steps are written too, and stay for good: to branch from (branch_from)."""
    keep_every: PositiveInt | None = None
    """Checkpoints of every such step stay for good; a multiple of checkpoint_every. null: none."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (offline unless WANDB_MODE says otherwise)."""
    trackio_project: str | None = None
    """Also log to this project of trackio (needs the trackio package): a database and a dashboard on this machine."""
    tensorboard: bool = False
    """Also write <output_dir>/tensorboard (needs the tensorboard package)."""
    tracked: Literal["short", "all"] = "short"
    """What wandb, trackio and TensorBoard get: the numbers that say how a run is doing, or all of metrics.jsonl. Sample
    pictures and heat maps of the experts' load come with both."""

    @model_validator(mode="after")
    def _check_milestones(self) -> Self:
        if self.score_every is not None and self.score is None:
            raise ValueError("score_every needs log.score: a reference at least")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of checkpoint_every ({self.checkpoint_every}): "
                "there is no checkpoint to keep at the other steps"
            )
        return self


class GuardConfig(Section):
    """What watches over a run and ends or mends it."""

    time_limit: Minutes | None = None
    """Minutes from the start after which the run saves a checkpoint and exits with status 75; null: no limit."""
    stop_before_end: Minutes | None = None
    """The same, so many minutes before the SLURM allocation ends (SLURM_JOB_END_TIME); null: leave it to signals."""
    max_bad_steps: PositiveInt = 10
    """Steps with a gradient that is not finite are skipped; so many in a row: back to a checkpoint, on other images."""
    diverged_above: Annotated[float, Field(gt=0)] | None = None
    """A record whose mean cross-entropy is above it ends the run for good, as diverged (status.json); null: none does.
    A model that has learnt nothing has ln(codebook_size)."""
    hang_timeout: Seconds | None = 480.0
    """Seconds without a step (or a tensor of a checkpoint) after which a rank dumps all stacks and exits with 124."""


class PretrainConfig(Section):
    """A whole run."""

    output_dir: UserPath
    """Where metrics.jsonl, checkpoints and weights go; running again resumes from there."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, order of samples and dropout."""
    init_weights: UserPath | None = None
    """Start from these weights: a directory of `mepa export` or `mepa upcycle`, or VAR's var_d16.pth; null: drawn."""
    init_missing: Literal["classes", "scales", "all"] = "classes"
    """In what init_weights may differ from the model. `classes`: classes, whose embeddings start anew but for those
    with the same name; `scales`: also the schedule, to which embeddings of positions and scales are resampled; `all`:
    also experts, which are made from a dense model's FFNs or copied from fewer experts."""
    branch_from: UserPath | None = None
    """Start from this checkpoint of another run, RUN/checkpoints/step_<number>, with all of its state, and go on with
    this recipe's length and schedule, which must have had the same rates so far; null: start at step 0."""
    tokenizer: UserPath
    """What made data.tokens: a saved tokenizer's directory, or VAR's vae_ch160v4096z32.pth."""
    data: DataConfig
    """Shard sets"""
    model: ModelConfig = ModelConfig()
    """Transformer"""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Losses"""
    optim: PretrainOptimConfig = PretrainOptimConfig()
    """Optimizer and schedule"""
    train: PretrainTrainConfig
    """Length and batch"""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks and precision"""
    log: LogConfig = LogConfig()
    """Records, evaluation, checkpoints"""
    guards: GuardConfig = GuardConfig()
    """Watching over the run"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_experts = self.model.moe.num_experts if self.model.moe else 1
        if num_experts % self.parallel.ep_size:
            raise ValueError(
                f"parallel.ep_size ({self.parallel.ep_size}) must divide model.moe.num_experts ({num_experts}): "
                "every rank of an expert-parallel group holds the same number of experts"
            )
        if self.branch_from is not None and self.init_weights is not None:
            raise ValueError("branch_from and init_weights both say where the weights come from; give one of them")
        if self.branch_from is not None and self.train.progressive is not None:
            raise ValueError(
                "branch_from does not go with train.progressive: when a scale joins depends on the length of the run; "
                "set train.progressive=null, in the run that it branches from too"
            )
        alignment = self.objective.alignment
        if self.branch_from is not None and alignment is not None and alignment.until is not None:
            raise ValueError(
                "branch_from does not go with objective.alignment.until: how strong guidance is at a step depends on "
                "the length of the run; set objective.alignment.until=null, in the run that it branches from too"
            )
        if alignment is not None:
            if self.data.features is None and self.data.teacher is None:
                needed = "data.features" if self.data.tokens is not None else "data.teacher"
                raise ValueError(
                    f"objective.alignment needs teacher features: set {needed}, or objective.alignment: null"
                )
            if max(alignment.scales) > len(self.model.scales):
                raise ValueError(
                    f"objective.alignment.scales: {list(alignment.scales)} are 1-based, "
                    f"but model.scales has only {len(self.model.scales)}"
                )
            if alignment.block_of(self.model.depth) >= self.model.depth:
                raise ValueError(
                    f"objective.alignment.block: {alignment.block} is 0-based, but model.depth is {self.model.depth}"
                )
        return self

    def check_world(self, world_size: int) -> None:
        """Raises UserError when the run cannot be spread over this many ranks."""
        if world_size % self.parallel.ep_size:
            raise UserError(
                f"parallel.ep_size ({self.parallel.ep_size}) must divide the number of ranks ({world_size}): "
                "start another number of ranks, or change ep_size"
            )
        per_step = world_size * self.train.accumulation
        if self.train.global_batch % per_step:
            raise UserError(
                f"train.global_batch ({self.train.global_batch}) must be a multiple of ranks x train.accumulation "
                f"({world_size} x {self.train.accumulation} = {per_step})"
            )
