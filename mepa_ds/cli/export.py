"""`mepa export`: weights for use anywhere, without DeepSpeed; with a model card and to the hub where asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.errors import UserError

if TYPE_CHECKING:
    from mepa_ds.checkpoint.run_models import RunModel


@dataclass
class ExportOptions:
    """Writes fp32 weights as safetensors + config.json (Hugging Face layout), of a checkpoint or of a run.

    mepa export RUN DIR --card: with the tokenizer, a picture, and README.md as a model card, for others to use.

    mepa export RUN DIR --push-to-hub OWNER/NAME: also uploads that to the Hugging Face hub.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint (<output_dir>/checkpoints/step_00001000), or a run or a project, whose best weights are taken."""
    directory: tyro.conf.Positional[Path]
    """Where the weights go; `mepa sample --weights` and `NextScaleTransformer.load` read it."""
    ema: bool = False
    """Export the average of the weights of the (newest) checkpoint instead (for a run with optim.ema)."""
    card: bool = False
    """Also write the tokenizer, a picture of samples, and README.md: numbers, classes, how to use it, the recipe."""
    license: str | None = None
    """Licence in the card, by the hub's identifiers: mit, apache-2.0, cc-by-nc-4.0; to be filled in if not given."""
    dataset: str | None = None
    """Training data in the card: a name on the hub, or words."""
    tokenizer: Path | None = None
    """The model's tokenizer, for the card; a run tells its own."""
    push_to_hub: str | None = None
    """OWNER/NAME of a model repository: uploads the directory with its card. Needs a login (hf auth login)."""
    private: bool = False
    """A repository that is made is private."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ExportOptions, prog="mepa export", args=argv)
    log.make_stdout_a_log()
    with_card = options.card or options.push_to_hub is not None
    for name in ("license", "dataset", "tokenizer"):
        if getattr(options, name) is not None and not with_card:
            raise UserError(f"--{name} belongs to --card")
    if options.private and options.push_to_hub is None:
        raise UserError("--private belongs to --push-to-hub")
    if options.push_to_hub is not None:
        from mepa_ds.model_cards.hub import check_repository

        check_repository(options.push_to_hub)
    from mepa_ds.checkpoint.run_models import find_model
    from mepa_ds.files import check_writable

    if not options.checkpoint.exists():
        raise UserError(f"{options.checkpoint}: not there; give a checkpoint, a run, or exported weights")
    found = find_model(options.checkpoint, "newest" if options.ema else "best")
    if options.directory.resolve() in (found.source.resolve(), found.run.resolve()):
        raise UserError(f"{options.directory}: holds what is exported; give another directory")
    tokenizer = found.tokenizer(options.tokenizer) if with_card else None
    check_writable(options.directory, "DIRECTORY")
    _export(options, found)
    log.say(f"weights of {found.source} in {options.directory}")
    if tokenizer is not None:
        _write_card(options, found, tokenizer)
    if options.push_to_hub is not None:
        from mepa_ds.model_cards.card import FILES
        from mepa_ds.model_cards.hub import push

        log.say(f"uploading to {options.push_to_hub} ...", flush=True)
        log.say(push(options.directory, options.push_to_hub, FILES, options.private))


def _export(options: ExportOptions, found: RunModel) -> None:
    from mepa_ds.checkpoint.fragment import EMA, MASTER
    from mepa_ds.checkpoint.weights import export_checkpoint
    from mepa_ds.model_cards.card import export_model

    if found.checkpoint is not None or options.ema:
        kind = EMA if options.ema else MASTER
        export_checkpoint(found.source, options.directory, kind, found.names_of_data())
    else:
        export_model(found, found.open(), options.directory)


def _write_card(options: ExportOptions, found: RunModel, tokenizer: Path) -> None:
    from mepa_ds.model_cards.card import CARD_NAME, CardOptions, write_card
    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.tokenizer.tokenizer import Tokenizer

    name = (options.push_to_hub or "").partition("/")[2] or options.directory.resolve().name
    model = NextScaleTransformer.load(options.directory)
    about = CardOptions(name, options.push_to_hub, options.license, options.dataset)
    opened = Tokenizer.open(tokenizer, model.config.scales)
    for line in write_card(options.directory, found, model, opened, about):
        log.say(f"note: {line}")
    log.say(f"model card: {options.directory / CARD_NAME}")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
