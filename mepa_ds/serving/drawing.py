"""What the page asks for, and one thread that draws it: the pictures after each scale, and the images.

Shapes: B images.
"""

from __future__ import annotations

import base64
import io
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mepa_ds import log
from mepa_ds.config.base import Section
from mepa_ds.errors import UserError
from mepa_ds.generation.class_names import caption, file_word
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import signed_to_uint8, to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer

Event = dict[str, Any]
"""`waiting` (number `ahead`), `scale` (`scale` of `of`, `side`, `images` if asked for), `done` (`images`, `files`,
`sheet`, `caption`, `command`, `seconds`) or `error` (`message`). Pictures are data URLs."""
MOST_CFG, MOST_TOP_K, MOST_SEED = 20.0, 10**6, 2**53 - 1  # the last is JavaScript's largest whole number
_MOST_SMALL, _MOST_LARGE, _SMALL_SIDE = 64, 16, 64
_MOST_WAITING, _PREVIEW_SIDE = 4, 128
_ACROSS = 4


class Wish(Section):
    """What to draw. `Drawer.check` knows the bounds that depend on the model."""

    label: Annotated[int, Field(ge=0)]
    """The class."""
    count: Annotated[int, Field(ge=1)] = 4
    """Images."""
    cfg: Annotated[float, Field(ge=0, le=MOST_CFG)] = 1.5
    """Guidance weight."""
    top_k: Annotated[int, Field(ge=0, le=MOST_TOP_K)] = 900
    """The k most probable codes; 0 is no limit."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.96
    """The most probable codes that together have this probability; 0 is no limit."""
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    """Image i is a function of the seed and i."""
    every_scale: bool = True
    """Whether to show what is decoded after each scale."""


class _StoppedError(Exception):
    """Nobody waits for the pictures any more."""


@dataclass(frozen=True)
class Shown:
    """What the page says of the model."""

    title: str
    weights: str
    step: int | None
    command: str
    """The beginning of the command that draws the same: `mepa sample --run DIR`."""


class Drawer:
    """Draws one wish after another, in a thread of its own. A few wait; more are refused."""

    def __init__(self, model: NextScaleTransformer, tokenizer: Tokenizer, shown: Shown):
        self._model, self._tokenizer, self._shown = model, tokenizer, shown
        self._thread = ThreadPoolExecutor(1, "drawing")
        self._waiting, self._count = 0, threading.Lock()
        self._closed = threading.Event()
        self.side = tokenizer.config.image_side
        self.most_images = _MOST_SMALL if self.side <= _SMALL_SIDE else _MOST_LARGE

    def facts(self) -> dict[str, Any]:
        """What the page needs to know of the model."""
        config, names = self._model.config, self._model.class_names
        most = {"count": self.most_images, "cfg": MOST_CFG, "seed": MOST_SEED, "top_k": MOST_TOP_K}
        defaults = Wish(label=0, every_scale=self.side <= _SMALL_SIDE).model_dump()
        return {
            "title": self._shown.title,
            "weights": self._shown.weights,
            "step": self._shown.step,
            "classes": [caption(label, names) for label in range(config.num_classes)],
            "sides": list(self._model.schedule.sides),
            "image_side": self.side,
            "most": most,
            "defaults": {**defaults, "top_k": min(defaults["top_k"], config.codebook_size)},
        }

    def check(self, wish: Wish) -> None:
        """Raises UserError for what this model cannot draw."""
        config = self._model.config
        for name, value, most in (
            ("label", wish.label, config.num_classes - 1),
            ("count", wish.count, self.most_images),
        ):
            if value > most:
                raise UserError(f"{name}: expected at most {most}, got {value}")

    def draw(self, wish: Wish, tell: Callable[[Event], object], stop: threading.Event) -> Future[None]:
        """Draws when it is this wish's turn. `tell` is called in the drawing thread; `stop` ends it after a scale.

        Raises:
            UserError: too many wait already.
        """
        with self._count:
            if self._waiting > _MOST_WAITING:
                raise UserError(f"{self._waiting} others wait for pictures; try again in a moment")
            ahead = self._waiting
            self._waiting += 1
        if ahead:
            tell({"event": "waiting", "ahead": ahead})
        return self._thread.submit(self._turn, wish, tell, stop)

    def close(self) -> None:
        """Ends what is being drawn after its scale, and what waits."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _turn(self, wish: Wish, tell: Callable[[Event], object], stop: threading.Event) -> None:
        try:
            tell(self._drawn(wish, tell, stop))
        except _StoppedError:
            pass
        except UserError as error:
            tell({"event": "error", "message": str(error)})
        except torch.OutOfMemoryError:
            tell({"event": "error", "message": f"out of GPU memory with {wish.count} images at once; ask for fewer"})
        except Exception as error:
            log.note(f"error: drawing {wish}: {type(error).__name__}: {error}")
            tell({"event": "error", "message": f"{type(error).__name__}: {error} (a bug; the terminal has it too)"})
        finally:
            with self._count:
                self._waiting -= 1

    def _drawn(self, wish: Wish, tell: Callable[[Event], object], stop: threading.Event) -> Event:
        started = time.perf_counter()
        sides = self._model.schedule.sides

        def on_scale(scale: int, f_hat: Tensor) -> None:
            if stop.is_set() or self._closed.is_set():
                raise _StoppedError
            event: Event = {"event": "scale", "scale": scale + 1, "of": len(sides), "side": sides[scale]}
            if wish.every_scale:
                pixels_BHW3 = signed_to_uint8(self._tokenizer.decode_f_hat(f_hat))
                event["images"] = [data_url(pixels, self.side <= _PREVIEW_SIDE) for pixels in pixels_BHW3]
            tell(event)

        if stop.is_set() or self._closed.is_set():
            raise _StoppedError
        images_B3HW = sample(
            self._model,
            self._tokenizer,
            [wish.label] * wish.count,
            cfg=wish.cfg,
            top_k=wish.top_k,
            top_p=wish.top_p,
            seed=wish.seed,
            on_scale=on_scale,
        )
        tiles = list(to_uint8(images_B3HW))
        names = self._model.class_names
        word = f"{file_word(wish.label, names)}_seed{wish.seed}"
        said = f"cfg {wish.cfg:g}, top-k {wish.top_k}, top-p {wish.top_p:g}, seed {wish.seed}"
        title = f"{caption(wish.label, names)}: {said}"
        rows = [tiles[start : start + _ACROSS] for start in range(0, len(tiles), _ACROSS)]
        return {
            "event": "done",
            "images": [data_url(pixels) for pixels in tiles],
            "files": [f"{word}_{number:02d}.png" for number in range(len(tiles))],
            "sheet": data_url(draw_sheet(rows, title=title).pixels_HW3),
            "sheet_file": f"{word}.png",
            "caption": title,
            "command": self._command(wish),
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _command(self, wish: Wish) -> str:
        options = {
            "--classes": wish.label,
            "--per-class": wish.count,
            "--batch-size": wish.count,
            "--cfg": f"{wish.cfg:g}",
            "--top-k": wish.top_k,
            "--top-p": f"{wish.top_p:g}",
            "--seed": wish.seed,
            "--out": "samples.png",
        }
        return f"{self._shown.command} {shlex.join(str(word) for pair in options.items() for word in pair)}"


def data_url(pixels_HW3: Pixels, lossless: bool = True) -> str:
    """A picture as a data URL: a PNG, or a JPEG where size counts more."""
    file, kind = io.BytesIO(), "png" if lossless else "jpeg"
    Image.fromarray(pixels_HW3).save(file, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
