"""What `mepa init` says: what it saw, what it chose, and why."""

from __future__ import annotations

from mepa_ds.data.shards.left_out import few
from mepa_ds.project.choosing.choices import Choices, train_images
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts
from mepa_ds.project.stages.display import in_words


def seen(images: ImageFacts) -> list[str]:
    """Lines on the images."""
    count = len(images.classes)
    classes = f"{count} classes ({few(images.classes)})" if count > 1 else f"one class ({few(images.classes)})"
    fewest, most = min(images.counts), max(images.counts)
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    smallest, median, largest = images.sides
    sides = f"{median}" if smallest == largest else f"{smallest} to {largest}, half of them {median} or more"
    sizes = ", ".join(f"{name}: {number}" for name, number in images.sizes.items())
    lines = [
        f"images:   {images.num_images} in {classes}, {each} each",
        f"          {images.colour}; shorter side in pixels: {sides}",
    ]
    if len(images.sizes) > 1:
        lines.append(f"          of {images.num_opened} opened, by shorter side: {sizes}")
    if images.heldout_words:
        lines.append("          held-out images are there already")
    return lines + [f"note:     {note}" for note in images.notes]


def chose(images: ImageFacts, machine: MachineFacts, chosen: Choices) -> list[str]:
    """Lines on the choices."""
    why = chosen.why
    on = f"{machine.gpus} GPUs of {machine.gpu_gigabytes:g} GB" if machine.gpus else (
        f"{machine.cores} CPU cores, {machine.gflops:g} GFLOP/s each"
    )  # fmt: skip
    num_train = train_images(images, chosen.heldout, chosen.heldout_share)
    model = chosen.preset or (f"depth {chosen.size.depth}, width {chosen.size.width}, 8 experts" if chosen.size else "")
    length = f"{chosen.steps} steps" if chosen.steps is not None else f"{chosen.epochs} epochs"
    made = "VAR's published one" if chosen.is_published else f"trained here, {chosen.tokenizer_steps} steps"
    lines = [f"machine:  {on}; {chosen.ranks} {'process' if chosen.ranks == 1 else 'processes'} train"]
    if chosen.heldout == "split":
        held = f"{images.num_images - num_train} images, {chosen.heldout_share:.0%} of each class"
        lines.append(f"held out: {held}, and never trained on")
    elif chosen.heldout == "none":
        lines.append("held out: none, so the run is not evaluated")
    lines += [
        f"side:     {chosen.side} pixels: {why['side']}",
        f"tokens:   scales {' '.join(map(str, chosen.scales))}, {why['scales']}",
        f"          {chosen.codebook_size} codes: {why['codebook']}; tokenizer: {made}",
        f"model:    {model}" + (f": {why['size']}" if "size" in why else ""),
        f"training: {length} of {chosen.batch} images"
        + (f" in {chosen.accumulation} micro-batches" if chosen.accumulation > 1 else "")
        + f": {why['steps']}",
        f"guidance: {'none' if chosen.teacher == 'none' else chosen.teacher}: {why['teacher']}"
        + ("" if chosen.teacher == "none" else f"; {why['guidance']}"),
    ]
    if not chosen.classifier and not chosen.is_published and len(images.classes) > 1:
        lines.append(
            "scores:   none: too few images for a classifier, or it would take over a third of the time; "
            "mepa evaluate --fit-classifier makes one"
        )
    if total := sum(chosen.seconds.values()):
        lines.append(f"time:     about {in_words(total)} for all stages, if nothing else runs here")
    return lines
