"""The line of the log that a training loop writes with each record, what its words mean, and how long is left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# The time left is estimated from so many records at most: one of them may have an evaluation in it, or a slow node.
_RECORDS = 20


class Word(NamedTuple):
    """A number in the line. `meaning` is for the legend; empty where the word needs none."""

    name: str
    text: str
    meaning: str = ""


def words_of_pretraining(values: Mapping[str, Any], heldout_ce: float | None) -> list[Word]:
    """Returns what the line says about a record `train`, and the last held-out score. What a run lacks is left out."""
    words = [
        Word("epoch", f"{values['epoch']:.2f}"),
        Word("loss", f"{values['loss']:.4f}", "the objective; like ce, cosine and norm a mean since the last line"),
        Word("ce", f"{values['ce']:.4f}", "cross-entropy in nats a token"),
    ]
    if heldout_ce is not None:
        words.append(Word("held-out", f"{heldout_ce:.4f}", "ce of the held-out set in the last evaluation"))
    if "guidance_cosine" in values:
        meaning = "guidance: how well hidden states fit the teacher's features, 1 at best"
        words.append(Word("cosine", f"{values['guidance_cosine']:.3f}", meaning))
    if "max_expert_share" in values:
        meaning = "the largest share of choices that one expert of a layer gets; 100 % / experts is even"
        words.append(Word("expert", f"{100 * values['max_expert_share']:.0f}%", meaning))
    if values.get("skipped_steps"):
        words.append(Word("skipped", str(values["skipped_steps"]), "steps without an update: a gradient not finite"))
    return [
        *words,
        Word("lr", f"{values['lr']:.2e}"),
        Word("norm", f"{values['grad_norm']:.2f}", "of the gradient, before clipping"),
    ]


_TOKENIZER = {
    "reconstruction": ("mse", "mean squared error of images in [-1, 1]"),
    "perceptual": ("lpips", "distance of deep features"),
    "adversarial": ("adversarial", "the generator's loss by the discriminator"),
}


def words_of_tokenizer(values: Mapping[str, Any], heldout_psnr: float | None) -> list[Word]:
    """Returns what the line says about a tokenizer's record `train`, and the last held-out PSNR in dB."""
    words = [Word("epoch", f"{values['epoch']:.2f}")]
    words.append(Word("loss", f"{values['loss']:.4f}", "all terms with their weights, as a mean since the last line"))
    for key, (name, meaning) in _TOKENIZER.items():
        if key in values:
            words.append(Word(name, f"{values[key]:.4f}", meaning))
    words.append(Word("codes", f"{100 * values['codebook_use']:.0f}%", "codes in use at some scale"))
    if heldout_psnr is not None:
        words.append(Word("held-out", f"{heldout_psnr:.2f} dB", "PSNR of held-out images in the last evaluation"))
    return [*words, Word("lr", f"{values['lr']:.2e}"), Word("norm", f"{values['grad_norm']:.2f}", "of the gradient")]


class LogLine:
    """Writes the lines of one start, each word explained when it is first seen. `seconds_left` is of the last line."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._explained: set[str] = set()
        self._time_left = TimeLeft(num_steps)
        self.seconds_left = math.nan

    def begin(self, step: int, now: float) -> None:
        """Notes the time (monotonic) at which the first step of this start is done; later calls do nothing."""
        if not self._time_left.has_begun:
            self._time_left.mark(step, now)

    def mark(self, step: int, now: float) -> None:
        """Notes the time (monotonic) of a record."""
        self._time_left.mark(step, now)

    def restart(self) -> None:
        """Forgets how long steps took, after a rollback."""
        self._time_left = TimeLeft(self._num_steps)

    def lines(self, step: int, words: Sequence[Word], images_per_second: float, step_seconds: float) -> list[str]:
        """Returns the line of `step`, after a legend of its new words. `step_seconds`: of the steps since the last."""
        self.seconds_left = self._time_left.seconds(step, step_seconds)
        new = [word for word in words if word.meaning and word.name not in self._explained]
        self._explained |= {word.name for word in new}
        legend = [f"legend  {'; '.join(f'{word.name}: {word.meaning}' for word in new)}"] if new else []
        numbers = "  ".join(f"{word.name} {word.text}" for word in words)
        speed = f"{images_per_second:.0f} images/s  {duration(self.seconds_left)} left"
        return [*legend, f"step {step}/{self._num_steps}  {numbers}  {speed}"]


@dataclass
class _Mark:
    step: int
    seconds: float


class TimeLeft:
    """The time left by the clock of the last 20 records: with evaluations, pictures and checkpoints in them."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._marks: deque[_Mark] = deque(maxlen=_RECORDS + 1)

    @property
    def has_begun(self) -> bool:
        return bool(self._marks)

    def mark(self, step: int, now: float) -> None:
        self._marks.append(_Mark(step, now))

    def seconds(self, step: int, step_seconds: float) -> float:
        """Returns the seconds that are left at `step`; from `step_seconds` until two marks are there."""
        first, last = (self._marks[0], self._marks[-1]) if self._marks else (None, None)
        if first is not None and last is not None and last.step > first.step:
            step_seconds = (last.seconds - first.seconds) / (last.step - first.step)
        return (self._num_steps - step) * step_seconds


def duration(seconds: float) -> str:
    """Returns "1:05", "2:00:05" or "3 d 02:00"; "?" for what is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
