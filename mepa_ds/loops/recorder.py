"""Where a run's numbers go: metrics.jsonl first, then a line in the log, a progress bar, and wandb if asked for."""

from __future__ import annotations

import os
import resource
import secrets
from typing import Any, Literal

import torch
from tqdm import tqdm

from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.files import write_json
from mepa_ds.metrics import MetricsWriter

RunStatus = Literal["running", "requeue", "finished", "failed"]


class Recorder:
    """The main rank's; other ranks have none."""

    def __init__(self, config: PretrainConfig, step: int, num_steps: int):
        self._metrics = MetricsWriter(config.output_dir / "metrics.jsonl", resume_step=step)
        self._bar = tqdm(total=num_steps, initial=step, desc="pretraining", unit="step", disable=None)
        self._num_steps = num_steps
        self._wandb = _start_wandb(config) if config.log.wandb_project else None
        self._status = config.output_dir / "status.json"
        self._write_status("running", step)

    def _write_status(self, state: RunStatus, step: int) -> None:
        write_json(self._status, {"state": state, "step": step, "num_steps": self._num_steps})

    def advance(self) -> None:
        self._bar.update()

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        record = {"event": event, "step": step, **values}
        self._metrics.write(record)
        if self._wandb is not None:
            self._wandb.log({f"{event}/{key}": value for key, value in _scalars(values).items()}, step=step)

    def say(self, line: str) -> None:
        """A line on the terminal, above the progress bar."""
        self._bar.write(line)

    def training(self, step: int, values: dict[str, Any]) -> None:
        self.record("train", step, values)
        left = (self._num_steps - step) * values["step_seconds"]
        text = (
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  ce {values['ce']:.4f}  "
            f"lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  {values['images_per_second']:.0f} images/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        self.say(text)

    def close(self, state: RunStatus, step: int, line: str) -> None:
        """Says and stores how the run ended."""
        self.say(line)
        self._write_status(state, step)
        self._bar.close()
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish()


def peak_memory_bytes() -> int:
    """The most memory this rank has used so far: resident on the CPU, allocated on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start_wandb(config: PretrainConfig) -> Any:
    import wandb

    identifier = config.output_dir / "wandb_id"
    if not identifier.exists():
        identifier.write_text(secrets.token_hex(4))
    return wandb.init(
        project=config.log.wandb_project,
        id=identifier.read_text(),
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        dir=str(config.output_dir),
        config=config.model_dump(mode="json"),
    )


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Lists become one entry an element: `ce_scale` of 3 scales is ce_scale/1 .. ce_scale/3."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": item for inner, item in _scalars(value).items()}
        elif isinstance(value, list):
            flat |= _scalars({f"{key}/{index}": item for index, item in enumerate(value, start=1)})
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat
