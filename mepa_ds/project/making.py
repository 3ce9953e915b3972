"""`mepa init` without --run: looks, chooses, says so, and writes the project's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mepa_ds import log
from mepa_ds.data.shards.left_out import few
from mepa_ds.errors import UserError
from mepa_ds.project import files
from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.choosing.choose import choose
from mepa_ds.project.choosing.planned import with_fitting_batches
from mepa_ds.project.commands import shell_script, stages
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.digits import DIGITS
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts
from mepa_ds.project.looking.machines import this_machine
from mepa_ds.project.looking.places import look
from mepa_ds.project.recipes import pretrain_recipe, tokenizer_recipe
from mepa_ds.project.summary import chose, seen
from mepa_ds.safety.text import printable


def make_project(out: Path, source: str, asked: dict[str, Any]) -> tuple[ImageFacts, Choices, Layout]:
    """Makes the project, or finds it as an earlier start made it.

    Args:
        asked: `minutes`, `side`, `teacher`, `gpus` and `memory`, each None where the user has not said.

    Raises:
        UserError: whatever is wrong with the images, the options or the place.
    """
    place = source if source == DIGITS else str(Path(source).expanduser().absolute())
    files.check_place(out, place)
    images, layout = look(source), Layout()
    log.say("\n".join(seen(images)), flush=True)
    asked = {"source": images.source, **asked}
    before = files.read(out)
    if before is not None and (before.asked, before.images) == (asked, files.as_json(images)):
        _renew(out, before, images, layout)
        return images, before.choices, layout
    if before is not None and (names := files.edited(out, before)):
        raise UserError(
            f"{printable(str(out))}: {few(names)} {'has' if len(names) == 1 else 'have'} been edited since mepa init "
            "wrote it, and options or images are others now; remove what should be written anew, or give another --out"
        )
    machine = this_machine(asked["gpus"], asked["memory"])
    chosen = _chosen(images, machine, asked, layout)
    log.say("\n".join(chose(images, machine, chosen)))
    texts = _texts(images, chosen, layout)
    files.write(out, texts, asked, images, machine, chosen)
    log.say(f"written:  {', '.join([*texts, files.NAME])} in {printable(str(out))}", flush=True)
    return images, chosen, layout


def _chosen(images: ImageFacts, machine: MachineFacts, asked: dict[str, Any], layout: Layout) -> Choices:
    chosen = choose(images, machine, asked["minutes"], asked["side"], asked["teacher"])
    return with_fitting_batches(chosen, images, machine, layout) if chosen.is_published else chosen


def _texts(images: ImageFacts, chosen: Choices, layout: Layout) -> dict[str, str]:
    texts = {} if chosen.is_published else {str(layout.tokenizer_recipe): tokenizer_recipe(chosen, images, layout)}
    texts[str(layout.recipe)] = pretrain_recipe(chosen, images, layout)
    return texts | {"commands.sh": shell_script(images, chosen, layout, stages(images, chosen, layout))}


def _renew(out: Path, before: files.Written, images: ImageFacts, layout: Layout) -> None:
    """Writes what has been removed, and says what is kept as it was edited."""
    names = files.edited(out, before)
    if names:
        log.say(f"kept:     {few(names)} as edited since; remove it to have it written anew")
    else:
        log.say(f"kept:     the recipes of {printable(str(out))}, of an earlier start with the same images and options")
    files.restore(out, before, _texts(images, before.choices, layout))
