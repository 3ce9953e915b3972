"""Operators and bytes of a training step and of sampling on a GPU, counted without a GPU.

    python benchmarks/fake_cuda.py                                  (prints the table of tests/fixtures/gpu_work.json)
    python benchmarks/fake_cuda.py --models var-d16=64 --json F     (others, at batches of one's choice)
    python benchmarks/fake_cuda.py --write                          (after a change: keeps what has shrunk)

The project's code runs on fake tensors of device cuda (benchmarks/fake_device.py), in bf16, experts as grouped GEMMs:

inputs      a stored batch to the device, int8 features decoded, codebook inputs, dropped labels, stochastic depth
forward     the objective on them
backward    its gradients
update      the optimizer on ZeRO's flat fp32 partitions of one rank
sampling    images with guidance, decoder included

Bytes are the memory traffic if every operand is read once and every result written once; an operator is one kernel.
Waits are the places where the host reads something back from the device, or copies to it from memory that is not
pinned: the GPU stands idle then. The figure is what tests/benchmarks/test_fake_cuda.py compares with: none of its sums
may grow.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.fake_backward import backward
from benchmarks.fake_device import Counter, Work, fake_cuda, zero_partitions
from benchmarks.public_way import PlainViT
from benchmarks.step_contenders import Contestants
from mepa_ds.command_line.tables import aligned
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.training import TrainingBatch
from mepa_ds.engine.optimizer import build_optimizer
from mepa_ds.generation.sampling import sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import PretrainingObjective
from mepa_ds.planning.memory_trace import materialise
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer import Tokenizer

FIGURE = Path(__file__).parent.parent / "tests" / "fixtures" / "gpu_work.json"
Phases = dict[str, Work]


@dataclass
class Options:
    """Prints one table a model: operators, GB and FLOPs of each phase, by family of operators."""

    models: tuple[str, ...] = ("nano=4", "mepa-d16=48")
    """MODEL=BATCH; MODEL is nano or a preset such as var-d16. A batch of `nano` is sampled, too."""
    json: Path | None = None
    """File for the figures."""
    write: bool = False
    """Keep the figures as those that may not grow. Refused if a sum has grown."""
    allow_growth: bool = False
    """With --write: keep them even so. The commit should say why."""


class _Here:
    """A module on the device already: fake parameters cannot be moved, not even to where they are."""

    def to(self, *_: object, **__: object) -> Any:
        return self


class _Quantizer(_Here, MultiScaleQuantizer):
    pass


class _Tokenizer(_Here, Tokenizer):
    pass


def trace_training(config: PretrainConfig, batch: TrainingBatch) -> Phases:
    """The work of one training step on one rank, by phase. The batch is on the CPU, as the loader gives it."""
    phases: Phases = {}
    with fake_cuda():
        with torch.device("meta"):
            transformer = NextScaleTransformer(config.model)
            objective = PretrainingObjective(transformer, config.objective, PlainViT.WIDTH)
            quantizer = _Quantizer(TokenizerConfig(scales=config.model.scales))
        with torch.device("cuda"):
            materialise(objective, torch.bfloat16)
            materialise(quantizer, torch.float32)
        maker = InputMaker(config.model, quantizer, 0, torch.device("cuda"))
        with _counted(phases, "inputs"):
            inputs = maker.training(batch)
        with _counted(phases, "forward"):
            losses = objective(inputs)
        with _counted(phases, "backward"):
            backward(losses.total)
        missing = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
        assert not missing, f"no gradient: {missing}"
        optimizer = build_optimizer(objective, config.optim, config.model.C)
        zero_partitions(optimizer)
        optimizer.step()  # the first one makes the moments
        with _counted(phases, "update"):
            optimizer.step()
    return phases


def trace_sampling(config: PretrainConfig, images: int) -> Work:
    """The work of a batch of images, sampled with guidance in bf16."""
    phases: Phases = {}
    with fake_cuda():
        with torch.device("meta"):
            model = NextScaleTransformer(config.model)
            tokenizer = _Tokenizer(TokenizerConfig(scales=config.model.scales))
        with torch.device("cuda"):
            materialise(model, torch.bfloat16)
            materialise(tokenizer, torch.float32)
        with _counted(phases, "sampling"):
            made = sample(model, tokenizer, [1] * images)
        assert made.shape == (images, 3, *[tokenizer.config.image_side] * 2)
    return phases["sampling"]


def _counted(phases: Phases, name: str) -> Counter:
    """A context that counts what runs within, and keeps it under a name."""
    counter = Counter()
    phases[name] = counter.work
    return counter


def trace(model: str, batch: int) -> Phases:
    """All phases of a model; those of a training step, and of sampling for the smallest."""
    contestants = Contestants(model, batch, "bf16", torch.device("cpu"))
    config = contestants.config
    return trace_training(config, contestants.batch) | (
        {"sampling": trace_sampling(config, batch)} if model == "nano" else {}
    )


def as_json(phases: Phases) -> dict[str, Any]:
    return {
        phase: {
            "operators": sum(work.operators.values()),
            "bytes": sum(work.bytes.values()),
            "waits": sum(work.waits.values()),
            "flops": round(work.flops),
            "families": {
                family: {"operators": work.operators[family], "bytes": work.bytes[family]}
                for family, _ in work.bytes.most_common()
            },
            "waits_in": dict(work.waits),
        }
        for phase, work in phases.items()
    }


def release() -> str:
    """PyTorch's, whose operators are counted: 2.14."""
    return ".".join(torch.__version__.split(".")[:2])


def read_figure() -> dict[str, Any]:
    """The figures that are kept, by MODEL=BATCH; none if they are of another release, which counts otherwise."""
    figure = json.loads(FIGURE.read_text()) if FIGURE.exists() else {}
    return figure["models"] if figure.get("torch") == release() else {}


def growth(found: dict[str, Any], kept: dict[str, Any]) -> Iterable[str]:
    """What is more than in the figure that is kept, a line each."""
    for model, phases in found.items():
        for phase, sums in phases.items():
            before = kept.get(model, {}).get(phase, sums)
            for key in ("operators", "bytes", "waits"):
                if sums[key] > before[key]:
                    yield f"{model}, {phase}: {key} were {before[key]:,}, and are {sums[key]:,}"


def table(phases: dict[str, Any]) -> str:
    """Each phase, its families of operators, and where the host waits in it."""
    rows = [("phase", "family", "operators", "GB", "TFLOP", "waits")]
    for phase, sums in phases.items():
        total = f"{sums['operators']}", f"{sums['bytes'] / 1e9:.2f}", f"{sums['flops'] / 1e12:.2f}", f"{sums['waits']}"
        rows.append((phase, "all", *total))
        for family, part in sums["families"].items():
            rows.append(("", family, f"{part['operators']}", f"{part['bytes'] / 1e9:.2f}", "", ""))
        rows += [("", f"wait in {place}", "", "", "", f"{times}") for place, times in sums["waits_in"].items()]
    return "\n".join(aligned(rows, left=2))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    found: dict[str, Any] = {}
    for word in options.models:
        model, _, batch = word.partition("=")
        if not batch.isdecimal() or int(batch) < 1:
            raise SystemExit(f"--models: expected MODEL=BATCH such as mepa-d16=48, got {word!r}")
        found[word] = as_json(trace(model, int(batch)))
        print(f"{model}, {batch} images, bf16, torch {torch.__version__}\n{table(found[word])}\n", flush=True)
    report = {"torch": release(), "models": found}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.write:
        kept = read_figure()
        if (grown := list(growth(found, kept))) and not options.allow_growth:
            raise SystemExit("not written, for it has grown (--allow-growth keeps it):\n" + "\n".join(grown))
        FIGURE.write_text(json.dumps(report | {"models": kept | found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
