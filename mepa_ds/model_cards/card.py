"""A directory that others can use: weights, tokenizer, pictures, and README.md as Hugging Face's model card."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds.checkpoint.run_models import RunModel
from mepa_ds.checkpoint.weights import WEIGHTS_FACTS_NAME
from mepa_ds.config.base import dump_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import DamagedError
from mepa_ds.files import write_json, write_text
from mepa_ds.generation.class_names import written_name
from mepa_ds.images.pictures import save_png
from mepa_ds.images.sets import read_pixels
from mepa_ds.model_cards.numbers import numbers_of
from mepa_ds.models.summary import count_parameters
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.safety.secrets import redacted
from mepa_ds.safety.text import printable
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import CONFIG_NAME

CARD_NAME, TOKENIZER, SAMPLES = "README.md", "tokenizer", "samples"
FILES = (CARD_NAME, CONFIG_NAME, "model*.safetensors*", WEIGHTS_FACTS_NAME, f"{TOKENIZER}/*", f"{SAMPLES}/*.png")
"""Patterns of what is in such a directory."""
_TO_FILL_IN = "To be filled in."
_FOLDED = 24  # more classes than that are folded away
_PICTURE = re.compile(r"step_(\d+)\.png")


@dataclass(frozen=True)
class CardOptions:
    """What a run does not know of itself."""

    name: str
    """Title of the card: the repository's name, or the run's."""
    repository: str | None = None
    """OWNER/NAME on the hub."""
    license: str | None = None
    """Hugging Face's identifier of the licence, such as mit or cc-by-nc-4.0."""
    dataset: str | None = None
    """What the model was trained on: a name on the hub, or in words."""


def write_card(
    directory: Path, found: RunModel, model: NextScaleTransformer, tokenizer: Tokenizer, options: CardOptions
) -> list[str]:
    """Writes README.md, the tokenizer and a picture of samples into a directory that has the model's weights.

    Returns lines to say: what is left to fill in, and what the run has not.
    """
    tokenizer.save_pretrained(directory / TOKENIZER)
    numbers, lines = numbers_of(found)
    picture = _copy_picture(found, directory)
    if picture is None:
        lines.append(f"pictures: {found.run} has no samples of this step (log.sample_every); the card shows none")
    if options.license is None:
        lines.append(f"licence: {_TO_FILL_IN} --license names it, or write it into {directory / CARD_NAME}")
    if options.dataset is None:
        lines.append(f"data: {_TO_FILL_IN} --dataset names them, or write them into {directory / CARD_NAME}")
    parts = [
        _front_matter(model, options),
        f"# {_text(options.name)}",
        _summary(model, tokenizer),
        "" if picture is None else f"![Samples]({SAMPLES}/{picture.name})\n\n{_of_picture(picture)}",
        _numbers(numbers),
        _use(model, options),
        _classes(model),
        f"## Training\n\nData: {_TO_FILL_IN if options.dataset is None else _text(options.dataset)}",
        "" if found.recipe is None else _recipe(found.recipe),
        f"## Licence\n\n{_TO_FILL_IN if options.license is None else _text(options.license)}",
    ]
    write_text(directory / CARD_NAME, "\n\n".join(part for part in parts if part) + "\n")
    return lines


def _front_matter(model: NextScaleTransformer, options: CardOptions) -> str:
    from huggingface_hub import ModelCardData

    tags = ["image-generation", "class-conditional", "visual-autoregressive", "next-scale-prediction"]
    tags += ["mixture-of-experts"] if model.config.moe else []
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", options.dataset or "")
    data = ModelCardData(
        license=options.license,
        library_name="mepa_ds",
        pipeline_tag="unconditional-image-generation",
        tags=tags,
        datasets=[on_hub[0]] if on_hub else None,
    )
    to_fill_in = "" if options.license is not None else "# license: to be filled in, such as mit or cc-by-nc-4.0\n"
    return f"---\n{to_fill_in}{data.to_yaml().strip()}\n---"


def _summary(model: NextScaleTransformer, tokenizer: Tokenizer) -> str:
    config, side = model.config, tokenizer.config.image_side
    moe = config.moe
    experts = ""
    if moe is not None:
        shared = " and a shared one" if moe.shared_expert else ""
        experts = f" Each token sees {moe.top_k} of {moe.num_experts} experts{shared}."
    return (
        f"Draws images of {side} x {side} pixels of {config.num_classes} classes, scale by scale: a next-scale "
        f"transformer of {config.depth} blocks and width {config.C} over token maps of sides "
        f"{', '.join(map(str, config.scales))}; {count_parameters(config)}.{experts} Trained with mepa_ds; the "
        f"tokenizer that it was trained with is in `{TOKENIZER}/`."
    )


def _copy_picture(found: RunModel, directory: Path) -> Path | None:
    """The newest picture of samples that the run drew up to the step of the weights."""
    by_step = {
        int(match[1]): path
        for path in (found.run / SAMPLES).glob("step_*.png")
        if (match := _PICTURE.fullmatch(path.name)) and not path.is_symlink()
    }
    steps = [step for step in by_step if found.step is None or step <= found.step]
    for old in (directory / SAMPLES).glob("step_*.png"):
        old.unlink()  # of an earlier export
    if not steps:
        return None
    path = by_step[max(steps)]
    try:  # decoded and encoded anew: a card is given away, and the run's directory may be a stranger's
        pixels_HW3 = read_pixels(path)
    except DamagedError:
        return None
    save_png(pixels_HW3, directory / SAMPLES / path.name)
    return path


def _of_picture(picture: Path) -> str:
    match = _PICTURE.fullmatch(picture.name)
    assert match is not None
    return f"Samples that the run drew at step {int(match[1])}: a row a class, none chosen by hand."


def _numbers(numbers: dict[str, str]) -> str:
    rows = "\n".join(f"| {name} | {_text(value)} |" for name, value in numbers.items())
    return f"## Numbers\n\n| | |\n|---|---|\n{rows}" if rows else ""


def _use(model: NextScaleTransformer, options: CardOptions) -> str:
    names = model.class_names
    first = next((name for name in names if name and printable(name) == name), None)
    labels = "[0, 0, 0, 0]" if first is None else f"[{json.dumps(first, ensure_ascii=False)}] * 4"
    where = "OWNER/NAME" if options.repository is None else options.repository
    chosen = shlex.quote("0" if first is None else written_name(first))
    return f"""## Use

```python
from pathlib import Path

import mepa_ds
from huggingface_hub import snapshot_download

folder = Path(snapshot_download("{where}"))  # or the directory with this file
model = mepa_ds.load_pretrained(folder)
tokenizer = mepa_ds.load_pretrained(folder / "{TOKENIZER}")
images = mepa_ds.sample(model, tokenizer, {labels}, cfg=1.5, seed=0)  # (4, 3, H, W) in [0, 1]
```

In the directory with this file:

```bash
mepa sample --weights . --tokenizer {TOKENIZER} --classes {chosen} --out samples.png
mepa serve --weights . --tokenizer {TOKENIZER}
```"""


def _classes(model: NextScaleTransformer) -> str:
    names = model.class_names[: model.config.num_classes]
    if not any(names):
        return f"## Classes\n\n{model.config.num_classes}, by number; the data had no names for them."
    rows = "\n".join(f"| {label} | {_text(name)} |" for label, name in enumerate(names))
    table = f"| label | name |\n|---:|---|\n{rows}"
    if len(names) > _FOLDED:
        table = f"<details><summary>{len(names)} classes</summary>\n\n{table}\n\n</details>"
    return f"## Classes\n\n{table}"


def _recipe(recipe: PretrainConfig) -> str:
    """The recipe, without secrets; of whole paths only their last part, since the others tell of a machine and nothing
    of a model."""
    text = redacted(dump_yaml(recipe))
    text = re.sub(r"(?m)(?<=[\s'\"])/(?:[^/\s'\"]+/)+(?=[^/\s'\"])", "", text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"<details><summary>The recipe</summary>\n\n{fence}yaml\n{text.strip()}\n{fence}\n\n</details>"


def _text(value: Any) -> str:
    """Plain text within Markdown, on one line: no HTML, no links, no cells of a table."""
    line = html.escape(printable(" ".join(str(value).split())), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line) if not re.fullmatch(r"`[^`|]*`", line) else line


def export_model(found: RunModel, model: NextScaleTransformer, directory: Path) -> None:
    """Writes the weights of a run's model, with a note of their step."""
    model.save_pretrained(directory)
    if found.step is not None:
        write_json(directory / WEIGHTS_FACTS_NAME, {"step": found.step})
