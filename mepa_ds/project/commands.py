"""The stages of a project: which commands make its data, its tokenizer, its model, its pictures and its scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mepa_ds.generation.class_names import spread_classes
from mepa_ds.images.resizing import RESIZE_RATIO
from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.layout import DINO_FILE, TOKENIZER_FILE, Layout
from mepa_ds.project.looking.facts import ImageFacts
from mepa_ds.project.stages.display import Expected
from mepa_ds.project.stages.run import Stage, as_typed, path_word
from mepa_ds.safety.text import printable

_BUILD, _PRECOMPUTE = "-m mepa_ds data build", "-m mepa_ds data precompute"
_ROWS = 20  # classes in the picture of samples
_MOST_JUDGED, _JUDGED = 1000, 50  # samples in all, and of a class


def stages(images: ImageFacts, chosen: Choices, layout: Layout) -> tuple[Stage, ...]:
    """In order; the report is not among them, for it is made of what these have left."""
    found = [
        _shards(images, chosen, layout),
        _tokenizer(chosen, layout),
        _precompute(images, chosen, layout),
        _pretraining(chosen, layout),
        _samples(images, chosen, layout),
        _scores(images, chosen, layout),
    ]
    return tuple(stage for stage in found if stage is not None)


def launcher(ranks: int) -> str:
    """Words before `-m`, for so many processes."""
    return f"-m torch.distributed.run --standalone --nproc-per-node {ranks} " if ranks > 1 else ""


def _expected(chosen: Choices, name: str, run: Path | None = None, steps: int = 0) -> Expected:
    return Expected(chosen.seconds.get(name, 0.0), run, steps)


def _shards(images: ImageFacts, chosen: Choices, layout: Layout) -> Stage | None:
    if images.kind == "ready_shards":
        return None
    options, meaning = list[str](), "scikit-learn's handwritten digits as WebDataset shards"
    if images.kind != "digits":
        side = round(RESIZE_RATIO * chosen.side) if chosen.is_published else chosen.side
        options = ["--on-damaged", "skip", "--image-side", str(side)]
        options += [] if chosen.is_published else ["--format", "png"]
        meaning = "images as WebDataset shards"
    splits: list[tuple[Sequence[str], Path]] = [(images.train_words, layout.train(images))]
    if chosen.heldout == "given":
        words = images.heldout_words
        if "--flat" in words:  # its folder has another name than the class
            words = (*words, "--classes", str(layout.train(images)))
        splits.append((words, layout.heldout(images)))
    elif chosen.heldout == "split":
        split = ("--hold-out", f"{chosen.heldout_share:g}", "--take")
        splits = [((*images.train_words, *split, "train"), layout.train(images))]
        splits.append(((*images.train_words, *split, "heldout"), layout.heldout(images)))
    return Stage(
        "shards",
        meaning,
        tuple(f"{_BUILD} {shlex.join([*words, '--out', str(out), *options])}" for words, out in splits),
        tuple(out for _, out in splits),
        tuple(out / "index.json" for _, out in splits),
        _expected(chosen, "shards"),
        # Images that came or went since the last start, which the commands do not tell.
        "" if images.kind == "digits" else f"{images.classes} {images.counts}",
    )


def _tokenizer(chosen: Choices, layout: Layout) -> Stage | None:
    if chosen.is_published:
        return None
    run = layout.tokenizer(chosen)
    return Stage(
        "tokenizer",
        "a small multi-scale VQVAE on them",
        (f"{launcher(chosen.ranks)}-m mepa_ds train-tokenizer {path_word(layout.tokenizer_recipe)}",),
        (run,),
        (run / "model.safetensors",),
        _expected(chosen, "tokenizer", run, chosen.tokenizer_steps),
    )


def _precompute(images: ImageFacts, chosen: Choices, layout: Layout) -> Stage:
    train, sets, commands = layout.train(images), list[Path](), list[str]()
    tool = (launcher(chosen.ranks) if chosen.is_published else "") + _PRECOMPUTE
    teacher = DINO_FILE if chosen.teacher == "dinov2-b" else layout.runs / "teacher"
    outputs = [] if chosen.teacher in ("none", "dinov2-b") else [teacher]
    beside = images.kind != "ready_shards"  # where a set is written by default
    if outputs:
        pixels = "" if chosen.scales[-1] == 4 else f" --pixels-per-cell {max(chosen.side // chosen.scales[-1], 4)}"
        if chosen.teacher == "patch-pca" and pixels:
            pixels += f" --window {2 * max(chosen.side // chosen.scales[-1], 4)}"
        commands.append(
            f"{_PRECOMPUTE} fit-teacher {chosen.teacher} {path_word(train)} --grid-side {chosen.scales[-1]}{pixels} "
            f"--out {path_word(teacher)}"
        )
    if chosen.teacher != "none":
        own = f" --out {path_word(layout.features(chosen))}" if not beside else ""
        side = f" --image-side {chosen.side}" if chosen.is_published else ""
        commands.append(
            f"{tool} features {path_word(train)} --teacher {chosen.teacher} --weights {path_word(teacher)}{side} "
            f"--codec int8{own}"
        )
        sets.append(layout.features(chosen))
    scales = f" --scales {' '.join(map(str, chosen.scales))}" if chosen.is_published and chosen.side != 256 else ""
    for split, directory in (("train", train), ("heldout", layout.heldout(images))):
        if split == "heldout" and chosen.heldout == "none":
            continue
        own = f" --out {path_word(layout.tokens(split, chosen))}" if not beside else ""
        tokenizer = path_word(layout.tokenizer(chosen))
        commands.append(f"{tool} tokens {path_word(directory)} --tokenizer {tokenizer}{scales}{own}")
        sets.append(layout.tokens(split, chosen))
    return Stage(
        "precompute",
        "token maps" + (f", and features of the teacher {chosen.teacher}" if chosen.teacher != "none" else ""),
        tuple(commands),
        (*outputs, *sets),
        tuple(path / "index.json" for path in sets),
        _expected(chosen, "precompute"),
    )


def _pretraining(chosen: Choices, layout: Layout) -> Stage:
    run = layout.pretrain
    results = [run / "last/model.safetensors", layout.weights(chosen) / "model.safetensors"]
    return Stage(
        "pretraining",
        f"MEPA under DeepSpeed on {chosen.ranks} {'ranks' if chosen.ranks > 1 else 'rank'}",
        (f"{launcher(chosen.ranks)}-m mepa_ds pretrain {path_word(layout.recipe)}",),
        (run,),
        tuple(dict.fromkeys(results)),
        _expected(chosen, "pretraining", run, chosen.steps or 0),
    )


def judged_per_class(num_classes: int) -> int:
    """Samples of each class that are scored."""
    return max(min(_JUDGED, _MOST_JUDGED // num_classes), 5)


def _samples(images: ImageFacts, chosen: Choices, layout: Layout) -> Stage:
    count = len(images.classes)
    model = f"--weights {path_word(layout.weights(chosen))} --tokenizer {path_word(layout.tokenizer(chosen))}"
    cfg = "" if chosen.cfg == 1.5 else f" --cfg {chosen.cfg:g}"
    some = f" --classes {','.join(map(str, spread_classes(count, _ROWS)))}" if count > _ROWS else ""
    commands = [f"-m mepa_ds sample {model} --per-class 10{cfg}{some} --out {path_word(layout.grid)}"]
    outputs = [layout.grid]
    if chosen.classifier:
        each = judged_per_class(count)
        commands.append(f"-m mepa_ds sample {model} --per-class {each}{cfg} --out {path_word(layout.samples)}")
        outputs.append(layout.samples)
    rows = f"{_ROWS} of the {count} classes" if some else "one row a class"
    return Stage(
        "samples",
        f"a grid of generated images, {rows}" + (", and files to be scored" if chosen.classifier else ""),
        tuple(commands),
        tuple(outputs),
        tuple(outputs),
        _expected(chosen, "samples"),
    )


def _scores(images: ImageFacts, chosen: Choices, layout: Layout) -> Stage | None:
    if not chosen.classifier:
        return None
    train, heldout = path_word(layout.train(images)), path_word(layout.heldout(images))
    classifier, scores = path_word(layout.classifier), path_word(layout.scores)
    return Stage(
        "scores",
        "a classifier of real images judges them, and its features compare them with held-out ones",
        (
            f"-m mepa_ds evaluate --fit-classifier {train} --heldout {heldout} --out {classifier}",
            f"-m mepa_ds evaluate {path_word(layout.samples)} --reference {heldout} --features classifier:{classifier} "
            f"--classifier {classifier} --json {scores}",
        ),
        (layout.classifier, layout.scores),
        (layout.classifier / "config.json", layout.scores),
        _expected(chosen, "scores"),
    )


_PUBLISHED = {
    TOKENIZER_FILE: "https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth",
    DINO_FILE: "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
}
_SLURM = """
# In place of torchrun, on a cluster (docs/slurm.md; it checks the recipe first, requeues and resumes by itself):
#   mepa slurm submit {recipe} --cluster h100 --nodes {nodes}
"""


def published_files(chosen: Choices) -> list[Path]:
    """Files that others have published, which the commands read and do not make."""
    teacher = [DINO_FILE] if chosen.teacher == "dinov2-b" else []
    return [TOKENIZER_FILE, *teacher] if chosen.is_published else teacher


def shell_script(images: ImageFacts, chosen: Choices, layout: Layout, found: Sequence[Stage]) -> str:
    """`commands.sh`: all commands, to be read, typed or run."""
    lines = [
        "#!/bin/bash",
        f"# From {_in_a_line(images.source)} to a model, command by command. `bash commands.sh` runs all of them;",
        "# `mepa init` with the same options and --run does, too, and goes on where it was stopped.",
        'set -euo pipefail\ncd "$(dirname "${BASH_SOURCE[0]}")"',
        "export OMP_WAIT_POLICY=PASSIVE",
        *([f"export OMP_NUM_THREADS={chosen.threads}"] if chosen.ranks > 1 else []),
    ]
    if files := published_files(chosen):
        lines += ["", "# Files that others have published, to be fetched once:", "#   mkdir -p weights"]
        lines += [f"#   curl -L -o {path} {_PUBLISHED[path]}" for path in files]
    for stage in found:
        lines += ["", f"# {stage.name}: {stage.meaning}", *map(as_typed, stage.commands)]
        if stage.name == "pretraining" and chosen.is_published:
            nodes = f"{max(chosen.ranks // 8, 1)} {_whole_paths(chosen, layout)}"
            lines.append(_SLURM.format(recipe=path_word(layout.recipe), nodes=nodes).rstrip())
            lines.append("#   (to be typed in this folder; whole paths, because jobs of a clone start in the clone)")
            lines.append(f"#   mepa pretrain {path_word(layout.recipe)} --dry-run --world-size {chosen.ranks}")
    lines += [
        "",
        "# report: curves, pictures and tables of the run",
        as_typed(report_command(layout)),
        "",
        "# a web page to draw samples on (it runs until Ctrl-C):",
        f"# {serve_command(layout)}",
    ]
    return "\n".join(lines) + "\n"


def _in_a_line(text: str) -> str:
    """A path in a comment: a line break in it would begin a command."""
    return " ".join(printable(text).split())


def report_command(layout: Layout) -> str:
    return f"-m mepa_ds report {path_word(layout.pretrain)}"


def serve_command(layout: Layout) -> str:
    return f"mepa serve --run {path_word(layout.pretrain)}"


def _whole_paths(chosen: Choices, layout: Layout) -> str:
    """The recipe's paths as overrides: whole ones, since jobs of a clone start in the clone."""
    paths = {"output_dir": layout.pretrain, "tokenizer": layout.tokenizer(chosen)}
    paths["data.tokens"] = layout.tokens("train", chosen)
    if chosen.teacher != "none":
        paths["data.features"] = layout.features(chosen)
    if chosen.heldout != "none":
        paths["data.heldout_tokens"] = layout.tokens("heldout", chosen)
    return "-- " + " ".join(f'"{key}=$PWD/{path}"' for key, path in paths.items())
