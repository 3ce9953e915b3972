"""`mepa sample`: images of chosen classes as one PNG grid, or one PNG each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import tyro

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import check_one_of
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable, identity_of_weights
from mepa_ds.generation.asked.arguments import Asked, asked_of, one_or_all
from mepa_ds.generation.asked.options import SampleOptions, named_as_options
from mepa_ds.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.tokenizer.tokenizer import Tokenizer

_DECIDES = ("per_class", "cfg", "top_k", "top_p", "seed", "smooth", "rng", "precision")
_TOLD = ("num_heads", "depth", "phi_ratio")  # what foreign weights do not tell
_NEWER = ("cfg_schedule", "guided_scales", "temperature", "negative", "towards", "share")
"""What earlier versions had not: it is told where it is not the default, so that their directories go on."""


def parse(argv: list[str]) -> SampleOptions:
    """Parses the options. Wrong words end the process with a message; values out of range raise UserError."""
    options = tyro.cli(SampleOptions, prog="mepa sample", args=argv)
    options.check()
    check_one_of(options.run, options.weights)
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    log.make_stdout_a_log()
    import torch

    from mepa_ds.checkpoint.run_models import find_chosen
    from mepa_ds.tokenizer.tokenizer import Tokenizer

    device = distributed.device_of(distributed.read_launch())
    found = find_chosen(options.run, options.weights)
    model = found.open(options.scales, num_heads=options.num_heads, depth=options.depth)
    model = model.to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    tokenizer = Tokenizer.open(found.tokenizer(options.tokenizer), model.config.scales, phi_ratio=options.phi_ratio)
    tokenizer = tokenizer.to(device)
    asked = asked_of(options, model, tokenizer)
    if options.run is not None:
        log.say(f"weights: {found.source}" + ("" if found.step is None else f", step {found.step}"))
    check_writable(options.out.parent if options.is_grid else options.out, "--out")
    started = time.perf_counter()
    if options.is_grid:
        drawn = _draw_grid(model, tokenizer, asked, options)
    else:
        hashes = {"weights": identity_of_weights(model.state_dict()), "tokenizer": tokenizer.identity, **asked.facts}
        drawn = _fill(model, tokenizer, asked, options, _made_by(options, **hashes))
    seconds = time.perf_counter() - started
    log.say(f"{drawn} images in {seconds:.1f} s ({drawn / seconds:.1f} images/s): {options.out}")


def _draw_grid(model: NextScaleTransformer, tokenizer: Tokenizer, asked: Asked, options: SampleOptions) -> int:
    import torch

    from mepa_ds.generation.class_names import caption, which_of
    from mepa_ds.images.pictures import save_grid

    draw = _sampler(model, tokenizer, asked, options)
    with _progress(len(asked.labels)) as bar:
        images = torch.cat([draw(part, bar) for part in _batches(len(asked.labels), options)])
    labels = [label for label in asked.classes if label is not None]
    told = (("cfg", options.cfg), ("top-k", options.top_k), ("top-p", options.top_p))
    title = ", ".join(f"{name} {' '.join(f'{value:g}' for value in values)}" for name, values in told)
    rows = ["no class" if label is None else caption(label, model.class_names) for label in asked.classes]
    columns = options.per_class
    if options.strips:
        columns, rows = model.schedule.num_scales, [row for row in rows for _ in range(options.per_class)]
    save_grid(
        images,
        options.out,
        columns,
        title=f"{title}, seed {options.seed}" + (which_of(labels, model.config.num_classes) if labels else ""),
        rows=rows,
    )
    return len(asked.labels)


def _fill(model: NextScaleTransformer, tokenizer: Tokenizer, asked: Asked, options: SampleOptions, made_by: str) -> int:
    from mepa_ds.generation.sample_files import fill_directory, image_paths

    draw = _sampler(model, tokenizer, asked, options)
    paths = image_paths(options.out, asked.labels, model.class_names)
    with _progress(len(paths)) as bar:
        return fill_directory(
            paths,
            _batches(len(paths), options),
            made_by,
            lambda part: draw(part, bar),
            lambda count: bar.update(count),
        )


def _progress(count: int) -> Progress:
    return Progress(total=count, desc="sampling", unit="image")


def _batches(count: int, options: SampleOptions) -> list[range]:
    step = count if options.rng == "var" else options.batch_size
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _sampler(
    model: NextScaleTransformer, tokenizer: Tokenizer, asked: Asked, options: SampleOptions
) -> Callable[[range, Progress], Tensor]:
    """Draws the images of a range: (B, 3, H, W) in [0, 1] on the CPU; with --strips (B S, 3, H, W)."""
    import torch

    from mepa_ds.generation.sampling import sample

    def draw(part: range, bar: Progress) -> Tensor:
        strips: list[Tensor] = []

        def note_scale(_: int, f_hat: Tensor) -> None:
            strips.append(tokenizer.decode_f_hat(f_hat).float().add(1).mul(0.5).clamp(0, 1).cpu())

        try:
            with named_as_options():
                images = sample(
                    model,
                    tokenizer,
                    asked.labels[part.start : part.stop],
                    first_index=part.start,
                    on_scale=note_scale if options.strips else None,
                    **asked.arguments(part),
                )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory with {len(part)} images at once; use a smaller --batch-size, or --precision bf16"
            ) from error
        bar.update(len(part))
        return torch.stack(strips, dim=1).flatten(0, 1) if options.strips else images.cpu()

    return draw


def _made_by(options: SampleOptions, **hashes: str) -> str:
    """Everything that an image is a function of, as JSON for its file. Weights are told by `hashes`: images are
    given away, and a path tells of a person and a machine."""
    facts = {
        **hashes,
        "classes": options.classes,
        **{
            name: one_or_all(value) if isinstance(value := getattr(options, name), tuple) else value
            for name in _DECIDES
        },
        **{name: getattr(options, name) for name in _NEWER if getattr(options, name) != getattr(SampleOptions, name)},
        **{name: getattr(options, name) for name in _TOLD if getattr(options, name) is not None},
    }
    return json.dumps(facts)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
