"""Held-out scores, scores and pictures of samples, made between two steps. They read the model and change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.options import LoaderOptions
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.errors import UserError
from mepa_ds.generation.sample_grids import SampleGrids, UnwrittenError
from mepa_ds.pretrain.evaluation.heldout import heldout_scores
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.runtime.recorder import Recorder
from mepa_ds.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mepa_ds.pretrain.evaluation.generated import GeneratedScores


class StopError(Exception):
    """A rank was asked to stop in the middle of an evaluation; raised on all ranks."""


class Evaluations:
    """Held-out scores and pictures of samples, made between two steps. All methods are collective.

    `on_batch` is called after every batch and every row of a picture; it may raise StopError, on all ranks.
    `beat` says that the process makes progress.
    """

    def __init__(
        self,
        config: PretrainConfig,
        engine: PretrainEngine,
        inputs: InputMaker,
        class_names: Sequence[str],
        on_batch: Callable[[], None],
        beat: Callable[[], None],
    ):
        self._data, self._batch_size, self._output = config.data, config.log.evaluate_batch, config.output_dir
        self._engine, self._inputs, self._on_batch = engine, inputs, on_batch
        self._seconds = 0.0
        self._grids: SampleGrids | None = None
        self._generated: GeneratedScores | None = None
        log = config.log
        if log.sample_every is None and log.score_every is None:
            return
        tokenizer = Tokenizer.open(config.tokenizer, config.model.scales).to(engine.device)
        if log.score_every is not None:
            # Networks and formulas that other runs need not wait for.
            from mepa_ds.pretrain.evaluation.generated import GeneratedScores

            assert log.score is not None
            self._generated = GeneratedScores(log.score, tokenizer, config.model.num_classes, config.seed, beat)
        if log.sample_every is not None:
            alone = config.parallel.ep_size == 1
            samples = config.output_dir / "samples"
            self._grids = SampleGrids(tokenizer, samples, config.model.num_classes, config.seed, alone, class_names)

    def heldout_scores(self) -> dict[str, Any]:
        """Scores data.heldout_tokens, which the recipe must name. See the function `heldout_scores`."""
        data, started = self._data, time.perf_counter()
        assert data.heldout_tokens is not None
        with self._engine.evaluating() as model:
            scores = heldout_scores(
                model,
                self._inputs,
                data.heldout_tokens,
                self._batch_size,
                LoaderOptions(num_workers=data.num_workers, on_damaged=data.on_damaged),
                self._on_batch,
            )
        self._seconds = time.perf_counter() - started
        return scores

    def record(self, recorder: Recorder, step: int, scores: dict[str, Any], is_best: bool) -> None:
        """Records the scores of `step`. `is_best` says that the weights of this step will be exported."""
        recorder.record("heldout", step, {"best": is_best, **scores, "seconds": self._seconds})
        recorder.say(
            f"step {step}  held-out ce {scores['ce']:.4f}, last scale {scores['ce_last']:.4f}"
            + ("  (best so far, exporting the weights)" if is_best else "")
        )

    def draw(self, recorder: Recorder, step: int) -> None:
        """Draws samples of the current model (log.sample_every). A failure is recorded and does not end the run."""
        assert self._grids is not None
        try:
            with self._engine.evaluating() as model:
                path = self._grids.write(model, step, self._on_batch)
        except UnwrittenError as error:  # raised on the main rank alone, after all ranks are done
            line = f"a picture could not be written ({error})"
            recorder.warn("write_failed", step, line, what="samples")
        except UserError as error:  # the weights are not finite; raised on every rank
            recorder.warn("samples_failed", step, f"no picture: {error}")
        else:
            where = str(path.relative_to(self._output))
            recorder.record("samples", step, {"path": where, "classes": self._grids.classes})
            recorder.say(f"step {step}  picture: {path}, {self._grids.shown}")

    def score(self, recorder: Recorder, step: int) -> None:
        """Scores images that the current model generates (log.score_every), and records the scores with their protocol.

        A model whose logits are not finite is recorded, and does not end the run.
        """
        assert self._generated is not None
        started = time.perf_counter()
        try:
            with self._engine.evaluating() as model:
                scores = self._generated.take(model, self._on_batch)
        except UserError as error:  # raised on every rank
            recorder.warn("scores_failed", step, f"no scores of generated images: {error}")
            return
        recorder.record("score", step, {**scores, "seconds": time.perf_counter() - started})
        recorder.say(f"step {step}  {self._generated.line(scores)}")
