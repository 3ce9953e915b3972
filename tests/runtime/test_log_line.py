"""The line of the log: what it says of a run, what it leaves out, its legend, and the time left."""

from __future__ import annotations

import math

import pytest

from mepa_ds.runtime.log_line import LogLine, TimeLeft, duration, words_of_pretraining, words_of_tokenizer

FULL = {
    "epoch": 1.5, "loss": 3.0, "ce": 3.25, "guidance_cosine": 0.5, "max_expert_share": 0.25,
    "lr": 1e-3, "grad_norm": 1.0
}  # fmt: skip


def test_the_line_has_all_that_a_run_has() -> None:
    line = LogLine(100)
    line.begin(1, 10.0)
    line.mark(10, 19.0)
    legend, text = line.lines(10, words_of_pretraining(FULL, 3.5), 640.0, 99.0)
    assert text == (
        "step 10/100  epoch 1.50  loss 3.0000  ce 3.2500  held-out 3.5000  cosine 0.500  expert 25%  lr 1.00e-03  "
        "norm 1.00  640 images/s  1:30 left"
    )
    for word in ("loss", "ce", "held-out", "cosine", "expert", "norm"):
        assert f" {word}: " in legend, "explained once"
    assert len(line.lines(20, words_of_pretraining(FULL, 3.5), 640.0, 99.0)) == 1


def test_what_a_run_lacks_is_in_neither_line_nor_legend() -> None:
    """A dense model without guidance, before its first evaluation."""
    values = {key: FULL[key] for key in ("epoch", "loss", "ce", "lr", "grad_norm")}
    line = LogLine(100)
    text = "\n".join(line.lines(1, words_of_pretraining(values, None), 640.0, 1.0))
    assert not any(word in text for word in ("held-out", "cosine:", "expert", "skipped", "None", "nan"))
    (legend, _) = line.lines(2, words_of_pretraining(values, 3.5), 640.0, 1.0)
    assert legend == "legend  held-out: ce of the held-out set in the last evaluation", "when it is first seen"


def test_the_tokenizers_line_is_in_its_terms() -> None:
    values = {"epoch": 0.5, "loss": 0.5, "reconstruction": 0.25, "codebook_use": 0.75, "lr": 1e-3, "grad_norm": 1.0}
    _, text = LogLine(10).lines(5, words_of_tokenizer(values, 21.5), 100.0, 2.0)
    assert text == (
        "step 5/10  epoch 0.50  loss 0.5000  mse 0.2500  codes 75%  held-out 21.50 dB  lr 1.00e-03  norm 1.00  "
        "100 images/s  0:10 left"
    )


def test_the_time_left_is_of_a_window_and_not_of_one_interval() -> None:
    left = TimeLeft(1000)
    assert left.seconds(0, 2.0) == 2000, "before two marks"
    for record in range(31):  # 1 s a step, and an evaluation of 100 s in the last interval
        left.mark(10 * record, 10.0 * record + (100 if record == 30 else 0))
    assert left.seconds(300, 11.0) == pytest.approx(700 * (200 + 100) / 200), "20 intervals of 10 steps"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (7205, "2:00:05"), (3 * 86400 + 7200, "3 d 02:00"), (math.nan, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
