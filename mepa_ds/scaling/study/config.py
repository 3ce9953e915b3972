"""The study file: which runs a scaling study has. Strict YAML, as a recipe is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.model import MoEConfig
from mepa_ds.config.optim import Fraction
from mepa_ds.config.values import PositiveInt, UserPath
from mepa_ds.objective.flops import PEAK_FLOPS
from mepa_ds.scaling.sizes import VAR_HEAD_WIDTH, SizeName

Positive = Annotated[float, Field(gt=0)]
# Not strict, so that 1e15 and 25600 are both numbers of FLOPs.
FlopBudget = Annotated[float, Field(gt=0, strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Grid(Section):
    """A cross of settings: every size with every MoE setting, every length, and so on."""

    sizes: Annotated[tuple[SizeName, ...], Field(min_length=1)]
    """Sizes, such as d16 (VAR's) or d4w128 (depth 4, width 128)."""
    moe: Annotated[tuple[MoEConfig | None, ...], Field(min_length=1)] = (None,)
    """model.moe of the runs; null is dense. Each replaces the base recipe's."""
    samples: tuple[PositiveInt, ...] | None = None
    """Lengths in images seen. Give samples or flops."""
    flops: tuple[FlopBudget, ...] | None = None
    """Budgets of model FLOPs (IsoFLOP profiles): each size gets the length that costs as much."""
    unique_images: Annotated[tuple[PositiveInt | None, ...], Field(min_length=1)] = (None,)
    """Images of the set to train on (data.unique_images); null: all."""
    batch: tuple[PositiveInt, ...] | None = None
    """Global batches; null: the base recipe's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.samples is None) == (self.flops is None):
            raise ValueError("give one of samples and flops")
        if not (self.samples or self.flops) or self.batch == ():
            raise ValueError("samples, flops and batch need at least one value each")
        return self


class Seeds(Section):
    """Points that are run again with other seeds: their spread is the noise floor of the study."""

    count: Annotated[int, Field(ge=2)]
    """Runs of each point in all; the seeds are the base recipe's, and the next ones."""
    at: Grid
    """Points of the grids above."""


class Sweep(Section):
    """Runs with other learning rates."""

    sizes: Annotated[tuple[SizeName, ...], Field(min_length=1)]
    moe: Annotated[tuple[MoEConfig | None, ...], Field(min_length=1)] = (None,)
    samples: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    factors: Annotated[tuple[Positive, ...], Field(min_length=3)] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Peak rates as multiples of lr.peak. The best must not be the first or the last."""


class LearningRates(Section):
    """How the peak learning rate depends on the run."""

    rule: Literal["fixed", "power", "tuned", "mup"] = "fixed"
    """fixed: lr.peak for all. power: lr.peak x (N / N of lr.reference)^lr.exponent. tuned: the law of the sweep's best
    rates, so the sweep runs first. mup: lr.peak at lr.base_width, transferred by optim.mup_base_width."""
    peak: Positive
    """Peak rate of the optimizer itself, whatever the batch; the planner writes optim.base_lr to match."""
    reference: SizeName | None = None
    """rule power: the size at which lr.peak holds."""
    exponent: float | None = None
    """rule power: the exponent of N, such as -0.25."""
    base_width: PositiveInt | None = None
    """rule mup: the width at which lr.peak was found."""
    sweep: Sweep | None = None
    """Runs for the law of the learning rate; rule tuned needs them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = {"power": ("reference", "exponent"), "tuned": ("sweep",), "mup": ("base_width",)}
        for rule, keys in needed.items():
            for key in keys:
                if self.rule == rule and getattr(self, key) is None:
                    raise ValueError(f"rule {rule} needs lr.{key}")
                if self.rule != rule and key != "sweep" and getattr(self, key) is not None:
                    raise ValueError(f"lr.{key} belongs to rule {rule}, and the rule is {self.rule}")
        if self.rule == "tuned" and self.sweep is not None:
            if len(set(self.sweep.sizes)) < 2:
                raise ValueError("rule tuned fits a power law of N to the sweep: sweep at two sizes or more")
            if len(set(self.sweep.samples)) > 1 or len(self.sweep.moe) > 1:
                raise ValueError("rule tuned fits one power law of N: sweep at one length and with one moe")
        return self


class StudySchedule(Section):
    """The learning rate over the steps of a run."""

    kind: Literal["lin0", "cosine", "constant", "wsd"] | None = None
    """optim.schedule; null: the base recipe's. All but constant end with the run, whatever its length."""
    warmup_steps: PositiveInt | None = None
    """The same warm-up for all lengths (optim.warmup_steps); wsd with branches needs it."""
    cooldown: Fraction | None = None
    """wsd: share of a run's steps in the cooldown."""
    branches: bool = False
    """wsd: the longest run of each point is the trunk; shorter ones branch off it and cost their cooldown alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "wsd" and (self.cooldown is not None or self.branches):
            raise ValueError("schedule.cooldown and schedule.branches belong to kind wsd")
        if self.branches and self.warmup_steps is None:
            raise ValueError("schedule.branches need schedule.warmup_steps: runs that share steps share their warm-up")
        return self


class Budget(Section):
    """What the runs cost, for the plan; nothing here changes a run."""

    device: str | None = None
    """A device by name, for its dense bf16 peak: H100, A100, ... (null: flops_per_second)."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the device's peak that a run will reach."""
    flops_per_second: FlopBudget | None = None
    """What one device really does in a second, in place of device and mfu."""
    ranks: PositiveInt = 1
    """Devices of each run."""
    price: Annotated[float, Field(ge=0)] | None = None
    """Of a device for an hour."""
    hours: Positive | None = None
    """Device-hours that the whole study may take; a plan that needs more is refused."""
    memory_gb: Positive | None = None
    """Memory of one device, for runs that would not fit; null: this machine's, if it is what the runs are for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.device is not None and self.peak_flops is None:
            raise ValueError(f"device: {self.device!r} is not known; known: {', '.join(PEAK_FLOPS)}")
        if self.hours is not None and self.speed is None:
            raise ValueError("budget.hours needs budget.device or budget.flops_per_second")
        return self

    @property
    def peak_flops(self) -> float | None:
        return next((peak for name, peak in PEAK_FLOPS.items() if self.device and name in self.device), None)

    @property
    def speed(self) -> float | None:
        """FLOPs that one device does in a second; None if the file does not say."""
        if self.flops_per_second is not None:
            return self.flops_per_second
        return None if self.peak_flops is None else self.peak_flops * self.mfu


class Prior(Section):
    """The law from which losses are simulated, to see what intervals the design would give: E + A N^-alpha + B D^-beta.

    N is `params_matrix`, D counts tokens. The defaults are VAR's law of the mean loss (its E 5 and exponent 0.20), and
    Chinchilla's part of the data; a pilot study gives better ones.
    """

    E: Annotated[float, Field(ge=0)] = 5.0
    A: Positive = 52.6
    alpha: Positive = 0.20
    B: Positive = 410.7
    beta: Positive = 0.28
    noise: Positive = 0.002
    """Standard deviation of log loss between seeds."""


class StudyConfig(Section):
    """A scaling study."""

    name: Name
    """Of the study; a directory that holds another one is refused."""
    base: UserPath
    """The recipe that all runs start from."""
    output_dir: UserPath
    """Where recipes, runs, tables and the report go."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe that all runs share, such as `model.drop_path: 0.0`; this pins what follows from the size."""
    head_width: PositiveInt = VAR_HEAD_WIDTH
    """Width of a head, for sizes with a width and no heads."""
    grids: Annotated[dict[Name, Grid], Field(min_length=1)]
    """The runs of the fits, by group."""
    seeds: Seeds | None = None
    """Repeated runs"""
    hold_out: Grid | None = None
    """Runs that no fit sees; they are predicted and compared."""
    lr: LearningRates
    """Learning rates"""
    schedule: StudySchedule = StudySchedule()
    """Schedule"""
    budget: Budget = Budget()
    """Costs"""
    prior: Prior = Prior()
    """For the intervals to expect"""
    laws: Annotated[
        tuple[Literal["chinchilla", "power", "data", "isoflop", "joint-moe", "var"], ...], Field(min_length=1)
    ] = ("chinchilla",)
    """Laws that the report fits; the plan refuses a design that cannot carry them."""
    diverged_above: Positive | None = None
    """A run whose mean cross-entropy of a record is above it has diverged and ends early; null: 1.5 ln(codebook)."""
