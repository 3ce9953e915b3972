"""LPIPS (arXiv 1801.03924) from the `lpips` package, with the backbone's weights from a local file."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Literal

from torch import nn

from mepa_ds.errors import UserError
from mepa_ds.weights.directories import load_strict
from mepa_ds.weights.state_dict_files import read_state_dict
from mepa_ds.weights.state_dicts import Wanted


def load_lpips(
    network: Literal["vgg", "alex"], backbone_weights: Path, what: str = "loss.perceptual.backbone_weights"
) -> nn.Module:
    """A frozen module of two batches of images (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    LPIPS's own linear weights ship with the package; `backbone_weights` is torchvision's vgg16 or alexnet, which the
    setting `what` names.

    Raises:
        UserError: the package is not installed, or the weights cannot be read or are another network's.
    """
    try:
        lpips = importlib.import_module("lpips")
    except ImportError as error:
        raise UserError(
            f"{what} needs the package lpips: pip install 'mepa_ds[perceptual]', or leave it out"
        ) from error
    with warnings.catch_warnings():  # lpips calls torchvision in a way that is being retired
        warnings.simplefilter("ignore", UserWarning)
        # pnet_rand: build the backbone without downloading; its weights come next.
        module = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    # Names that both networks have.
    wanted = Wanted(f"torchvision's {network}", ("features.0.weight", "features.0.bias", "features.10.weight"))
    state = read_state_dict(backbone_weights, "features.", wanted)
    load_strict(module.net, _by_slice(module.net, state), f"{what}: {backbone_weights}")
    return module.requires_grad_(False).eval()


def _by_slice(backbone: nn.Module, state: dict) -> dict:
    """torchvision's `features.N.weight` under the names of lpips, which cuts the features into `sliceM.N.weight`."""
    ours = {re.sub(r"slice\d+\.", "features.", name): name for name in backbone.state_dict()}
    return {ours.get(name, name): tensor for name, tensor in state.items()}
