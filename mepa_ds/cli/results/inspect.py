"""`mepa inspect`: pictures of what a model does, with the data beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import tyro

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.remote import RemoteSchemes
from mepa_ds.command_line.scales import Scales
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable, naming_full_disks, naming_full_gpus
from mepa_ds.progress import Progress

if TYPE_CHECKING:
    from mepa_ds.inspection.subject import Drawn, Subject
    from mepa_ds.inspection.tracing import Traced

Part = Literal["scales", "routing", "load", "specialisation", "alignment", "sweep"]
_MOST_CLASSES, _MAPS = 8, 4


@dataclass
class InspectOptions:
    """Draws what a model does; every picture has its numbers beside it, and inspect.json lists them all.

    scales: how samples come about, scale by scale (also a GIF). routing: which expert each position chose, over the
    image. load: the experts' load and the routers' entropy over training. specialisation: what experts know of the
    class (mutual information). alignment: where hidden states agree with the teacher. sweep: samples by guidance weight
    and top-k. What a model or its directory cannot show is said in one line. A GPU is used where there is one.
    """

    subject: tyro.conf.Positional[Path]
    """A run (output_dir: its newest checkpoint is taken), a project with one run, a checkpoint, or weights: a directory
    of safetensors, VAR's var_d16.pth. Training curves need the run, alignment a checkpoint."""
    tokenizer: Path | None = None
    """The model's tokenizer: its directory, or VAR's file; a run tells its own."""
    out: Path | None = None
    """Directory of the pictures; if not given, inspect/step_00001000 (or the weights' name) in the run, or here."""
    only: tuple[Part, ...] = get_args(Part)
    """Draw these parts alone."""
    tokens: Path | None = None
    """Token set whose images are routed; the run's held-out tokens if not given, samples where there are none."""
    images: int = 256
    """Images that are routed, for the maps and for the mutual information: as many of each class, 8 at least."""
    classes: str | None = None
    """Classes to show, by number, range or name: 207,360 or 0-7 or "Ankle boot,Bag"; up to 8 over all if not given."""
    cfg: float = 1.5
    """Guidance weight of samples."""
    top_k: int = 900
    """Samples draw from the k most probable codes."""
    top_p: float = 0.96
    """Samples draw from the most probable codes that together have this probability."""
    seed: int = 0
    """Of the samples."""
    sweep_cfg: tuple[float, ...] | None = None
    """Guidance weights of the sweep; 0 1.5 3 5 if not given."""
    sweep_top_k: tuple[int, ...] | None = None
    """Values of top-k of the sweep; from 1 to the whole codebook if not given."""
    batch_size: int = 16
    """Images at a time."""
    scales: Scales = None
    """Sides of the token maps, such as 1 2 3 4, if VAR weights do not tell them and they are not VAR's own."""
    remote_schemes: RemoteSchemes = ()


def main(argv: list[str]) -> None:
    options = tyro.cli(InspectOptions, prog="mepa inspect", args=argv)
    for name, value in (("images", options.images), ("batch-size", options.batch_size)):
        if value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}")
    if not options.only:
        raise UserError(f"--only: name at least one of {', '.join(get_args(Part))}")
    log.make_stdout_a_log()
    from mepa_ds.data.remote.schemes import allow
    from mepa_ds.inspection.subject import open_subject, write_index

    allow(options.remote_schemes)  # what the run's own recipe says is no word of the user
    device = distributed.device_of(distributed.read_launch())
    subject, left_out = open_subject(options.subject, options.tokenizer, options.scales, device)
    out = options.out or (subject.run or Path()) / "inspect" / subject.source.name
    check_writable(out, "--out")
    step = "" if subject.step is None else f", step {subject.step}"
    log.say(f"inspecting {subject.source}{step}")
    pictures = []
    with naming_full_disks(out), naming_full_gpus(options.batch_size):
        parts = _Parts(options, subject, out)
        for part in parts.all():
            drawn = part()
            if isinstance(drawn, str):
                left_out.append(drawn)
            else:
                pictures += drawn
        left_out += parts.notes
        index = write_index(out, subject, pictures, left_out)
    for picture in pictures:
        log.say(picture.path)
    for line in left_out:
        log.say(f"left out: {line}")
    log.say(f"what each shows: {index}")


class _Parts:
    """The parts of a report, each a function that draws it."""

    def __init__(self, options: InspectOptions, subject: Subject, out: Path):
        from mepa_ds.generation.class_names import parse_classes, spread_classes
        from mepa_ds.inspection.tracing import Sampling, check_maker, held_out_tokens

        self._options, self._subject, self._out = options, subject, out
        count = subject.model.config.num_classes
        given = options.classes
        names = subject.class_names
        self._classes = spread_classes(count, _MOST_CLASSES) if given is None else parse_classes(given, count, names)
        self._sampling = Sampling(options.cfg, options.top_k, options.top_p, options.seed, options.batch_size)
        self._traced: Traced | None = None
        self._tokens, line = (options.tokens, None) if options.tokens else held_out_tokens(subject)
        self.notes = [line] if line and subject.blocks else []
        """Lines to say beside those of parts that are left out."""
        if self._tokens is not None and subject.blocks:
            check_maker(subject, self._tokens)  # before anything is drawn

    def all(self) -> list[Callable[[], Drawn]]:
        wanted = self._options.only
        return [getattr(self, f"_{name}") for name in get_args(Part) if name in wanted]

    def _scales(self) -> Drawn:
        from mepa_ds.inspection.scales import draw_scales

        with _progress("scale by scale", len(self._classes)) as bar:
            return draw_scales(self._subject, self._classes, self._sampling, self._out, bar.update)

    def _routing(self) -> Drawn:
        from mepa_ds.inspection.routing import draw_routing

        return draw_routing(self._subject, self._trace(), self._classes[:_MAPS], self._out)

    def _load(self) -> Drawn:
        from mepa_ds.inspection.training_load import draw_training_load

        return draw_training_load(self._subject, self._out)

    def _specialisation(self) -> Drawn:
        from mepa_ds.inspection.specialisation import draw_specialisation

        return draw_specialisation(self._subject, self._trace(), self._out)

    def _alignment(self) -> Drawn:
        from mepa_ds.inspection.guidance import draw_guidance

        return draw_guidance(self._subject, self._classes, self._out)

    def _sweep(self) -> Drawn:
        from mepa_ds.inspection.sweep import CFGS, MOST_CLASSES, default_top_ks, draw_sweep

        cfgs = self._options.sweep_cfg or CFGS
        top_ks = self._options.sweep_top_k or default_top_ks(self._subject.model.config.codebook_size)
        count = len(cfgs) * len(top_ks) * min(len(self._classes), MOST_CLASSES)
        with _progress("guidance by top-k", count) as bar:
            return draw_sweep(self._subject, self._classes, (cfgs, top_ks), self._sampling, self._out, bar.update)

    def _trace(self) -> Traced | None:
        """The routed images, which two parts share; None for a dense model, which routes nothing."""
        from mepa_ds.inspection import tracing

        if self._traced is None and self._subject.blocks:
            count, size = self._options.images, self._options.batch_size
            tokens = self._tokens
            if tokens is not None:
                labels_N = tracing.labels_of(tokens, self._subject.model.config.num_classes)
                numbers = tracing.choose_images(labels_N, self._classes, count)
                with _progress("routing", len(numbers)) as bar:
                    self._traced = tracing.trace_tokens(self._subject, tokens, numbers, size, bar.update)
            else:
                labels = self._sampled_labels(count)
                with _progress("routing", count) as bar:
                    self._traced = tracing.trace_samples(self._subject, labels, self._sampling, bar.update)
        return self._traced

    def _sampled_labels(self, count: int) -> list[int]:
        """As many images of each class, the shown classes among them; few images are of few classes."""
        classes = self._classes
        num_classes = self._subject.model.config.num_classes
        if count >= 4 * num_classes:
            classes = list(range(num_classes))
        return [classes[number % len(classes)] for number in range(count)]


def _progress(what: str, count: int) -> Progress:
    return Progress(total=count, desc=what, unit="image")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
