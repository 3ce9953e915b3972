"""The trackers that a recipe names."""

from __future__ import annotations

import importlib.util

from mepa_ds.config.pretrain import LogConfig, PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.runtime.trackers.service import Trackio, Wandb
from mepa_ds.runtime.trackers.tensorboard import TensorBoard
from mepa_ds.runtime.trackers.tracker import Tracker


def open_trackers(config: PretrainConfig, step: int) -> list[Tracker]:
    """Opens the trackers that the recipe names, at a step of the run."""
    recipe = config.model_dump(mode="json")
    trackers: list[Tracker] = []
    if config.log.wandb_project:
        trackers.append(Wandb(config.log.wandb_project, config.output_dir, recipe))
    if config.log.trackio_project:
        trackers.append(Trackio(config.log.trackio_project, config.output_dir, recipe))
    if config.log.tensorboard:
        trackers.append(TensorBoard(config.output_dir / "tensorboard", step))
    return trackers


def check_packages(log: LogConfig) -> None:
    """Raises UserError when the recipe asks for a tracker whose package is not installed."""
    if log.trackio_project and importlib.util.find_spec("trackio") is None:
        raise UserError("log.trackio_project: needs the trackio package; run: pip install trackio")
    if log.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError("log.tensorboard: needs the tensorboard package; run: pip install tensorboard") from error
        except Exception:  # an error in its own imports; the run warns and continues without it
            return
